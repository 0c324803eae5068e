"""Learned rewards: networks, and ensembles of them.

A reward is evaluated in critic targets, scores, baselines and queries, and all of these must see
one and the same function. So every model here is in evaluation mode at all times, and only
`RewardModel.fitting` switches dropout and batch statistics on, for as long as it lasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from birl_ext.errors import OptionError, ShapeError
from birl_ext.model import checks

__all__ = [
    "FeatureReward",
    "RewardEnsemble",
    "RewardModel",
    "RewardNetwork",
    "global_draws_from",
    "members_of",
    "spread",
]

_SCALE = 1 / 255
_CONVOLUTIONS = ((7, 3), (5, 2), (3, 1), (3, 1))
"""Kernel and stride."""


class RewardModel(nn.Module):
    """A function (observation (m, *O), action (m, *A)) → r (m,), and when it may be noisy."""

    def __init__(self) -> None:
        super().__init__()
        self._fitting = False

    def all_actions(self, observation: Tensor) -> Tensor:
        """r(s, ·) of discrete actions, (m, A), in one pass."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode, whatever is asked for, but inside `fitting`."""
        return super().train(mode and self._fitting)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Training mode while it lasts: for steps on the data that the model is fitted to only."""
        models = [module for module in self.modules() if isinstance(module, RewardModel)]
        before = [model._fitting for model in models]
        for model in models:
            model._fitting = True
        self.train()
        try:
            yield
        finally:
            for model, kept in zip(models, before, strict=True):
                model._fitting = kept
            self.train(self._fitting)


class RewardNetwork(RewardModel):
    """A reward computed by a network.

    Integers other than uint8 reach the body as they are, as indices; uint8 pixels are divided by
    255, here and nowhere else; all else is converted to the body's dtype.

    Args:
        body: observations (m, *O) → (m, A) for discrete actions; otherwise observation and action
            side by side, (m, |O| + |A|), → (m, 1). Its mode is this model's from now on.
        actions: A; None if actions are continuous.

    Gradients: any order, through the parameters, observation and action.
    """

    def __init__(self, body: nn.Module, *, actions: int | None) -> None:
        super().__init__()
        self.body = body
        self.actions = actions
        self.eval()

    @classmethod
    def table(cls, states: int, actions: int) -> RewardNetwork:
        """One parameter per state and action, zero at first; observations are (m,) int64."""
        for name, count in (("states", states), ("actions", actions)):
            checks.check_count(name, count)
        body = nn.Embedding(states, actions)
        nn.init.zeros_(body.weight)
        return cls(body, actions=actions)

    @classmethod
    def mlp(
        cls,
        observation_size: int,
        generator: torch.Generator,
        *,
        actions: int | None = None,
        action_size: int = 0,
        hidden: Sequence[int] = (64, 64),
    ) -> RewardNetwork:
        """Fully connected layers with tanh between them.

        Args:
            observation_size: |O|.
            generator: of the initial weights, on the CPU.
            actions: A, of discrete actions.
            action_size: |A|, of continuous ones.
            hidden: width of each hidden layer.
        """
        if (actions is None) == (action_size == 0):
            raise OptionError(
                f"actions is {actions!r} and action_size {action_size!r}",
                fix="give actions for discrete ones, action_size for continuous ones",
            )
        sizes = [observation_size + action_size, *hidden]
        with global_draws_from(generator):
            layers: list[nn.Module] = [nn.Flatten()]
            for before, after in zip(sizes, hidden, strict=False):
                layers += [nn.Linear(before, after), nn.Tanh()]
            layers.append(nn.Linear(sizes[-1], actions or 1))
        return cls(nn.Sequential(*layers), actions=actions)

    @classmethod
    def cnn(
        cls,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        actions: int,
        channels: int = 16,
        width: int = 64,
        dropout: float = 0.5,
    ) -> RewardNetwork:
        """Four convolutions with batch norm, dropout and leaky ReLU, then two linear layers.

        Args:
            shape: channels, height, width of an observation, pixels; at least 43 × 43.
            generator: of the initial weights, on the CPU.
            actions: A, discrete.
            channels: of each convolution.
            width: of the hidden linear layer.
            dropout: probability, in fitting only.
        """
        into, *sides = shape
        layers: list[nn.Module] = []
        with global_draws_from(generator):
            for kernel, stride in _CONVOLUTIONS:
                layers += [
                    nn.Conv2d(into, channels, kernel, stride),
                    nn.BatchNorm2d(channels),
                    nn.LeakyReLU(0.01),
                    nn.Dropout(dropout),
                ]
                into, sides = channels, [(side - kernel) // stride + 1 for side in sides]
            if min(sides) < 1:
                raise ShapeError(
                    f"observations have shape {shape}", allowed="(C, H, W), 43 × 43 or larger"
                )
            layers += [
                nn.Flatten(),
                nn.Linear(into * math.prod(sides), width),
                nn.LeakyReLU(0.01),
                nn.Linear(width, actions),
            ]
        # a CPU convolves pixels faster with the channels innermost
        body = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(body, actions=actions)

    def all_actions(self, observation: Tensor) -> Tensor:
        """r(s, ·), (m, A).

        Raises:
            OptionError: the actions are continuous.
            ShapeError: the body returned something else.
        """
        if self.actions is None:
            raise OptionError("actions are continuous", fix="call the reward with an action")
        every: Tensor = self.body(self._prepared(observation))
        if every.shape != (len(observation), self.actions):
            raise ShapeError(
                f"the body returned shape {tuple(every.shape)}",
                allowed=f"(m, A) = ({len(observation)}, {self.actions})",
            )
        return every

    def below_last(self, observation: Tensor) -> Tensor:
        """What the last layer of a Sequential body is applied to, (m, h); of discrete actions."""
        assert isinstance(self.body, nn.Sequential)
        below: Tensor = self.body[:-1](self._prepared(observation))
        return below

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """r(s, a), (m,)."""
        if self.actions is not None:
            if action.is_floating_point() or action.shape != observation.shape[:1]:
                raise ShapeError(
                    f"action has shape {tuple(action.shape)}, {action.dtype}",
                    allowed=f"integers ({len(observation)},)",
                )
            return self.all_actions(observation).gather(1, action.unsqueeze(1)).squeeze(1)
        parts = [self._prepared(observation).flatten(1), self._prepared(action).flatten(1)]
        reward: Tensor = self.body(torch.cat(parts, 1))
        if reward.shape != (len(observation), 1):
            raise ShapeError(
                f"the body returned shape {tuple(reward.shape)}",
                allowed=f"(m, 1) = ({len(observation)}, 1)",
            )
        return reward.squeeze(1)

    def _prepared(self, given: Tensor) -> Tensor:
        parameter = next(self.parameters(), None)
        dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
        if given.dtype == torch.uint8:
            return given.to(dtype).mul_(_SCALE)
        if given.is_floating_point() or given.dtype == torch.bool:
            return given.to(dtype)
        return given


class FeatureReward(RewardModel):
    """r = x·ψ(s, a) of fixed features: a reward of few knobs.

    Args:
        features: ψ, (S, A, k), of states that are indices; x is zero at first.

    Gradients: any order, through x.
    """

    features: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        if features.dim() != 3 or not features.numel():
            raise ShapeError(
                f"features have shape {tuple(features.shape)}", allowed="(S, A, k), 1 or more each"
            )
        self.register_buffer("features", features)
        self.weight = nn.Parameter(features.new_zeros(features.shape[-1]))
        self.eval()

    def all_actions(self, observation: Tensor) -> Tensor:
        """r(s, ·), (m,) int64 → (m, A)."""
        return self.features[observation] @ self.weight

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """r(s, a), (m,)."""
        return self.features[observation, action] @ self.weight


class RewardEnsemble(RewardModel):
    """Several rewards; the mean is the reward, the spread says where they disagree.

    After `normalise` the reward is the mean of the members in units of their own standard
    deviations: (1/E) Σ_i r_i/σ_i. Each is still fitted, asked and compared as it is.

    Args:
        members: E ≥ 1 models.
    """

    scale: Tensor
    """σ, (E,), units of reward."""

    def __init__(self, members: Iterable[RewardModel]) -> None:
        super().__init__()
        members = list(members)
        for index, member in enumerate(members):
            checks.check_kind(f"members[{index}]", member, RewardModel)
        self.members = nn.ModuleList(members)
        if not self.members:
            raise OptionError("an ensemble has no members", allowed="1 or more")
        self.register_buffer("scale", torch.ones(len(self.members)))
        self.eval()

    @classmethod
    def of(cls, count: int, build: Callable[[], RewardModel]) -> RewardEnsemble:
        """`count` models, each built anew."""
        return cls(build() for _ in range(checks.check_count("count", count)))

    def each(self, observation: Tensor, action: Tensor) -> Tensor:
        """The members' rewards, (E, m)."""
        return torch.stack([member(observation, action) for member in self.members])

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Mean over members, (m,)."""
        return self.combined(self.each(observation, action))

    def each_all_actions(self, observation: Tensor) -> Tensor:
        """The members' r(s, ·), (E, m, A)."""
        return torch.stack([_as_model(one).all_actions(observation) for one in self.members])

    def all_actions(self, observation: Tensor) -> Tensor:
        """Mean over members of r(s, ·), (m, A)."""
        return self.combined(self.each_all_actions(observation))

    def combined(self, each: Tensor) -> Tensor:
        """The reward from those of the members, (E, …) → (…)."""
        return (each / self.scale.to(each).view(-1, *[1] * (each.dim() - 1))).mean(0)

    @torch.no_grad()
    def normalise(self, observation: Tensor, action: Tensor) -> None:
        """Take σ from m steps, as constants from now on; 1 where a member is the same at all."""
        self.scale.copy_(spread(self.each(observation, action)))

    def std(self, observation: Tensor, action: Tensor) -> Tensor:
        """Standard deviation over members, divisor E, (m,)."""
        return self.each(observation, action).std(0, correction=0)


def spread(reward: Tensor) -> Tensor:
    """Standard deviation over the last axis, divisor m; 1 where that is rounding, of a constant."""
    found = reward.std(-1, correction=0)
    least = 1e-6 * reward.abs().amax(-1)
    return torch.where(found > least, found, torch.ones_like(found))


def members_of(reward: RewardModel) -> list[nn.Module]:
    """The models that have a loss each: the members of an ensemble, or the reward alone.

    Raises:
        OptionError: an ensemble is inside another model. By the loss of their mean alone its
            members would all move alike.
    """
    members: list[nn.Module] = [reward]
    if isinstance(reward, RewardEnsemble):
        members = list(reward.members)
    if any(isinstance(part, RewardEnsemble) for one in members for part in one.modules()):
        raise OptionError(
            f"an ensemble is inside a {type(reward).__name__}",
            allowed="an ensemble by itself, of models that hold none",
            fix="fit the inner ensemble, by itself",
        )
    return members


def _as_model(module: nn.Module) -> RewardModel:
    assert isinstance(module, RewardModel)
    return module


@contextmanager
def global_draws_from(
    generator: torch.Generator, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Inside, torch's global generators continue one number drawn from `generator`; afterwards they
    are as before.

    Args:
        generator: on the CPU; advances by one draw.
        device: whose global generator follows, besides the CPU's.
    """
    device = torch.device(device)
    seed = int(torch.randint(2**62, (), generator=generator))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield
