"""SoBiRL in one file, to be read: torch, gymnasium and numpy, nothing of birl_ext.

A teacher sees two fragments of CartPole and says, with errors, in which the pole stood longer.
From 300 such answers a reward network is learned, and the policy that is best for it:

    upper level   min over x of φ(x) = E[ l(d₁, d₂, y; x) ],  d₁, d₂ ~ π*(x)
                  l = −y log p − (1 − y) log(1 − p),  p = σ(R_x(d₁) − R_x(d₂)),  R = Σ r_x(s, a)
    lower level   π*(x) = softmax(Q/τ),  Q = r_x + γ E τ log Σ exp(Q'/τ)

    ∇φ = E[ ∇l ] + (1/τ) E[ (l − b) Σ_h (∇Q − ∇V)(s_h, a_h) ]

The first part fits the reward to the answers, which is all that DRLHF does. The second is what the
fragments themselves owe to the reward, since it moves the policy that shows them. Here ∇Q − ∇V is
cut after its first term, ∇r(s, a) − Σ π(a'|s) ∇r(s, a'): the "one-step score". What is left is
mostly noise: it is averaged over updates, shrunk by its own standard error, and at most a tenth as
long as the first part, since answers are used again and again.

    python examples/sobirl_one_file.py [--seed 0] [--steps 20000]    # under a minute

birl_ext.SoBiRL has more: other estimators, environments and teachers, dτ/dx, a noise that counts
how often answers were used, a loss that weighs them alike, and guards.
Source: Yang, Gao and Yuan (2025), Algorithm SoBiRL.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, mse_loss


@dataclass
class Settings:
    seed: int = 0
    steps: int = 20_000  # of the environment
    round: int = 1000  # steps from one batch of questions to the next
    first_answers: int = 60  # before the agent learns
    answers: int = 12  # of each round
    fragment: int = 25  # steps
    rationality: float = 1.0  # of the teacher, per step that the pole stands longer
    recent: int = 4000  # steps that fragments are cut from
    first_epochs: int = 100
    reward_updates: int = 20  # of each round
    reward_rate: float = 3e-4
    pairs: int = 64  # of an update
    average: float = 0.98  # of the score's part
    indirect_limit: float = 0.1  # of the score's part, in units of the loss's
    weight_limit: float = 5.0  # importance weights are cut to [1/5, 5]
    discount: float = 0.99
    entropy: float = 0.5 * math.log(2)  # nats, that the temperature holds the policy at
    agent_rate: float = 2.3e-3  # falls to zero
    burst: int = 128  # updates of the agent, after twice as many steps
    batch: int = 64
    target_rate: float = 0.03


def mlp(inputs: int, outputs: int, hidden: int, between: type[nn.Module]) -> nn.Sequential:
    layers = (nn.Linear(inputs, hidden), between(), nn.Linear(hidden, hidden), between())
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


# ---- lower level: soft Q-learning ----------------------------------------------------------------


class SoftQ:
    """π = softmax(Q/τ), where τ follows a target for the policy's entropy."""

    def __init__(self, observation: int, actions: int, settings: Settings) -> None:
        self.settings = settings
        self.q = mlp(observation, actions, 256, nn.ReLU)
        self.slow = copy.deepcopy(self.q)
        self.log_tau = torch.zeros((), requires_grad=True)
        self.optimiser = torch.optim.Adam(self.q.parameters(), settings.agent_rate, fused=True)
        self.tau_optimiser = torch.optim.Adam([self.log_tau], settings.agent_rate)
        total = settings.steps // 2
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimiser, 1.0, 0.0, total)

    @property
    def tau(self) -> float:
        return float(self.log_tau.detach().exp())

    @torch.no_grad()
    def log_policy(self, observation: Tensor) -> Tensor:
        """log π(·|s), (*n, A)."""
        return (self.q(observation) / self.tau).log_softmax(-1)

    def update(
        self, seen: Tensor, action: Tensor, ahead: Tensor, goes_on: Tensor, reward: Tensor
    ) -> None:
        tau = self.tau
        with torch.no_grad():
            value = tau * (self.slow(ahead) / tau).logsumexp(-1)
            goal = reward + self.settings.discount * goes_on * value
        table = self.q(seen)
        loss = mse_loss(table.gather(-1, action[:, None])[:, 0], goal)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        for slow, fast in zip(self.slow.parameters(), self.q.parameters(), strict=True):
            slow.data.lerp_(fast.data, self.settings.target_rate)
        entropy = torch.distributions.Categorical(logits=table.detach() / tau).entropy().mean()
        self.log_tau.grad = entropy - self.settings.entropy  # more random than asked: τ falls
        self.tau_optimiser.step()


# ---- the teacher ---------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """n pairs of fragments of H steps."""

    observation: Tensor  # (n, 2, H, O)
    action: Tensor  # (n, 2, H)
    log_prob: Tensor  # (n, 2, H), of the policy that acted
    present: Tensor  # (n, 2, H), False after the end of an episode
    label: Tensor  # (n,): 1 if the first is better, 0 if the second


def ask(episodes: list[list[Any]], count: int, settings: Settings, rng: Any) -> Pairs:
    """Cut pairs of fragments from episodes, each place equally likely, and have them compared.

    Of each step there are observation, action, log π(a|s) and true reward, which only he sees.
    """
    length = settings.fragment
    places = [(one, at) for one in episodes for at in range(max(1, len(one) - length + 1))]
    shape = (count, 2, length)
    observation = np.zeros((*shape, len(episodes[0][0][0])), np.float32)
    action, log_prob, true, present = np.zeros((4, *shape), np.float32)
    for row, side in np.ndindex(count, 2):
        episode, start = places[rng.integers(len(places))]
        for h, step in enumerate(episode[start : start + length]):
            for part, value in zip((observation, action, log_prob, true), step, strict=True):
                part[row, side, h] = value
            present[row, side, h] = 1
    better = true.sum(-1) @ [1, -1]
    label = rng.random(count) < 1 / (1 + np.exp(-settings.rationality * better))
    parts = (observation, action.astype(int), log_prob, present.astype(bool), label.astype("f"))
    return Pairs(*map(torch.from_numpy, parts))


# ---- upper level: the reward ---------------------------------------------------------------------


def cross_entropy(table: Tensor, pairs: Pairs) -> Tensor:
    """l of each pair, (n,), from r(s_h, ·), (n, 2, H, A)."""
    reward = table.gather(-1, pairs.action[..., None])[..., 0]
    first, second = torch.where(pairs.present, reward, 0.0).sum(-1).unbind(1)
    margin = first - second
    return -(pairs.label * logsigmoid(margin) + (1 - pairs.label) * logsigmoid(-margin))


def gradient_parts(
    reward: nn.Module, agent: SoftQ, pairs: Pairs, weight_limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's part and the score's part of the estimate of ∇φ, each as one vector; and half of
    what the score's parts of two halves of the pairs differ by, the noise of the whole.

    ∇φ̂ = (1/n) Σ_i w_i [ ∇l_i + (l_i − b_i) ∇h_i/τ ],  h = Σ_h r(s_h, a_h) − Σ_a π(a|s_h) r(s_h, a),
    b_i the mean loss of the other pairs, w = Π π_now/π_then, cut.
    """
    parameters = list(reward.parameters())
    table, log_policy = reward(pairs.observation), agent.log_policy(pairs.observation)
    taken = pairs.action[..., None]
    now = log_policy.gather(-1, taken)[..., 0]
    gap = torch.where(pairs.present, now - pairs.log_prob, 0.0).sum(-1)  # of each fragment, (n, 2)
    most = math.log(weight_limit)
    weight = gap.clamp(-most, most).exp().prod(1)

    loss = cross_entropy(table, pairs)
    score = table.gather(-1, taken)[..., 0] - (log_policy.exp() * table).sum(-1)
    score = torch.where(pairs.present, score, 0.0).sum((1, 2))  # of both fragments, (n,)
    weighed = weight * loss.detach()
    others = (weighed.sum() - weighed) / (weight.sum() - weight)
    indirect = (weighed - weight * others) * score / agent.tau
    sign = 1.0 - 2.0 * (torch.arange(len(loss)) % 2)

    def gradient(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    return tuple(gradient(of.mean()) for of in (weight * loss, indirect, sign * indirect))


class NoiseLimited:
    """max(0, 1 − c σ²/‖m‖²) m:  m = Σ w_s g_s, w_s ∝ βᵗ⁻ˢ, an average of gradients of variance σ²,
    c = (1 − ρ) Σ w² + ρ, since two that are made of n of the same N pairs share ρ = n/N of it.
    """

    def __init__(self, size: int, decay: float) -> None:
        self.decay, self.mean = decay, torch.zeros(size)
        self.mass = self.squares = self.variance = self.shared = 0.0

    def after(self, gradient: Tensor, variance: float, shared: float) -> Tensor:
        """What is used, with this gradient in the average."""
        keep, add = self.decay, 1 - self.decay
        self.mass, self.squares = keep * self.mass + add, keep**2 * self.squares + add**2
        self.variance = keep * self.variance + add * variance
        self.shared = keep * self.shared + add * shared
        self.mean = self.mean + (gradient - self.mean) * (add / self.mass)
        rho = self.shared / self.mass
        noise = ((1 - rho) * self.squares / self.mass**2 + rho) * self.variance / self.mass
        size = float(self.mean.double().square().sum())
        return max(0.0, 1 - noise / size) * self.mean if size else self.mean


def true_return(agent: SoftQ, seed: int, episodes: int = 5) -> float:
    """Of the likeliest actions."""
    environment, total = gymnasium.make("CartPole-v1"), 0.0
    for episode in range(episodes):
        seen, ended = environment.reset(seed=seed + episode)[0], False
        while not ended:
            action = int(agent.log_policy(torch.from_numpy(seen)).argmax())
            seen, reward, terminated, cut_off, _ = environment.step(action)
            total, ended = total + float(reward), terminated or cut_off
    return total / episodes


def run(settings: Settings) -> list[dict[str, float]]:
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    environment, size, actions = gymnasium.make("CartPole-v1"), 4, 2
    agent = SoftQ(size, actions, settings)
    reward = mlp(size, actions, 64, nn.Tanh)
    parameters = list(reward.parameters())
    optimiser = torch.optim.AdamW(parameters, settings.reward_rate)
    average = NoiseLimited(sum(p.numel() for p in parameters), settings.average)
    replay: list[tuple[Any, ...]] = []
    episodes: deque[list[Any]] = deque([[]])
    history: list[dict[str, float]] = []
    kept: Pairs | None = None
    seen, _ = environment.reset(seed=settings.seed)
    for step in range(1, settings.steps + 1):
        log_policy = agent.log_policy(torch.from_numpy(seen))
        if step <= settings.round:  # there is no reward yet
            log_policy = torch.full((actions,), -math.log(actions))
        action = int(torch.multinomial(log_policy.exp(), 1))
        ahead, paid, terminated, cut_off, _ = environment.step(action)
        episodes[-1].append((seen, action, float(log_policy[action]), paid))
        replay.append((seen, action, ahead, float(not terminated)))
        seen = ahead
        if terminated or cut_off:
            seen, _ = environment.reset()
            episodes.append([])
        if step > settings.round and step % (2 * settings.burst) == 0:
            for _ in range(settings.burst):
                drawn = (replay[i] for i in rng.integers(len(replay), size=settings.batch))
                columns = map(np.array, zip(*drawn, strict=True))
                states, taken, later, goes_on = map(torch.from_numpy, columns)
                with torch.no_grad():
                    told = reward(states).gather(-1, taken[:, None])[:, 0]
                agent.update(states, taken, later, goes_on.float(), told)
        if step % settings.round == 0:
            while sum(map(len, episodes)) - len(episodes[0]) >= settings.recent:
                episodes.popleft()
            count = settings.answers if kept else settings.first_answers
            new = ask([one for one in episodes if one], count, settings, rng)
            with torch.no_grad():  # before it is learned from: an estimate of φ
                phi = float(cross_entropy(reward(new.observation), new).mean())
            if not kept:
                for _ in range(settings.first_epochs):
                    optimiser.zero_grad()
                    cross_entropy(reward(new.observation), new).mean().backward()
                    optimiser.step()
            kept = Pairs(*map(torch.cat, zip(kept, new, strict=True))) if kept else new
            for _ in range(settings.reward_updates):
                some = torch.randperm(len(kept.label))[: settings.pairs]
                batch = Pairs(*(part[some] for part in kept))
                parts = gradient_parts(reward, agent, batch, settings.weight_limit)
                direct, indirect, apart = parts
                variance, shared = float(apart.square().sum()), len(some) / len(kept.label)
                indirect = average.after(indirect, variance, shared)
                longest = settings.indirect_limit * direct.norm()
                indirect *= (longest / indirect.norm().clamp(min=1e-12)).clamp(max=1)
                pieces = (direct + indirect).split([p.numel() for p in parameters])
                for parameter, piece in zip(parameters, pieces, strict=True):
                    parameter.grad = piece.view_as(parameter)
                optimiser.step()
            found = true_return(agent, seed=settings.seed + 10**6)
            row = {"step": step, "answers": len(kept.label), "phi": phi, "true_return": found}
            history.append(row | {"temperature": agent.tau})
            print("  ".join(f"{name} {value:.5g}" for name, value in history[-1].items()))
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20_000)
    torch.set_num_threads(1)
    run(Settings(**vars(parser.parse_args())))
