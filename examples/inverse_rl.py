"""Learn a reward from demonstrations: maximum-entropy inverse reinforcement learning.

An expert with an unknown reward r(s,a) = features(s,a)·w acts in a known random MDP. We see 200 of
its walks of 20 steps and maximise their likelihood over w, through the planner. The inverse of the
Hessian gives standard errors: of the likelihood of all steps, their sum, and not their mean.
"""

import torch

import birl_ext

STATES, ACTIONS, FEATURES = 12, 3, 4


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    transition = torch.rand(STATES, ACTIONS, STATES).softmax(-1)
    features = torch.randn(STATES, ACTIONS, FEATURES)
    planner = birl_ext.nn.SoftPlanner(discount=0.9, temperature=1.0, transition=transition)

    true_weights = torch.randn(FEATURES)
    expert = planner(features @ true_weights).policy
    state, counts = torch.zeros(200, dtype=torch.long), torch.zeros(STATES, ACTIONS)
    for _ in range(20):
        action = expert[state].multinomial(1).squeeze(-1)
        counts.index_put_((state, action), torch.ones(len(state)), accumulate=True)
        state = transition[state, action].multinomial(1).squeeze(-1)

    weights = torch.zeros(FEATURES, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def negative_log_likelihood(w: torch.Tensor) -> torch.Tensor:
        return -(counts * planner(features @ w).log_policy).sum()

    def mean_loss() -> torch.Tensor:  # per step, as line searches like it
        optimiser.zero_grad()
        loss = negative_log_likelihood(weights) / counts.sum()
        loss.backward()
        return loss

    before = optimiser.step(mean_loss).item()
    after = mean_loss().item()
    learned = weights.detach()
    hessian = torch.autograd.functional.hessian(negative_log_likelihood, learned)
    errors = torch.linalg.inv(hessian).diagonal().sqrt()
    gap = float((planner(features @ learned).policy - expert).abs().max())
    print(f"loss {before:.4f} -> {after:.4f}; learned policy within {gap:.3f} of the expert's")
    for true, found, error in zip(true_weights, learned, errors, strict=True):
        print(f"weight {true:7.4f}, learned {found:7.4f} ± {error:.4f}")
    assert after < before
    assert gap < 0.1
    assert ((learned - true_weights).abs() < 4 * errors).all()


if __name__ == "__main__":
    main()
