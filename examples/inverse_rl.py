"""Learn a reward from demonstrations: maximum-entropy inverse reinforcement learning.

An expert with an unknown reward r(s,a) = features(s,a)·w acts in a known random MDP. We see 200 of
its walks of 20 steps and maximise their likelihood over w, through the planner.
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

    def negative_log_likelihood() -> torch.Tensor:
        optimiser.zero_grad()
        loss = -(counts * planner(features @ weights).log_policy).sum() / counts.sum()
        loss.backward()
        return loss

    before = optimiser.step(negative_log_likelihood).item()
    after = negative_log_likelihood().item()
    gap = float((planner(features @ weights.detach()).policy - expert).abs().max())
    print(f"loss {before:.4f} -> {after:.4f}; learned policy within {gap:.3f} of the expert's")
    print("true weights   ", true_weights.tolist())
    print("learned weights", weights.tolist())
    assert after < before
    assert gap < 0.1


if __name__ == "__main__":
    main()
