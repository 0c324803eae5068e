"""SoBiRL in an environment and with a teacher of one's own.

A cart on a rail has to be brought to the middle and kept there. Nobody writes down a reward to
learn from: a teacher sees two stretches of the cart's path and says which one stayed nearer to it.
"""

import gymnasium
import numpy as np

import birl_ext


class Rail(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-2, 2, (2,))  # place and speed of the cart
    action_space = gymnasium.spaces.Discrete(3)  # push it to the left, not at all, to the right

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cart = np.array([self.np_random.uniform(-1, 1), 0], np.float32)
        return self.cart, {}

    def step(self, action):
        speed = 0.9 * self.cart[1] + 0.1 * (action - 1)
        self.cart = np.array([self.cart[0] + speed, speed], np.float32).clip(-2, 2)
        return self.cart, -abs(float(self.cart[0])), False, False, {}  # this reward judges alone


def nearer(first, second):
    """One answer for each pair of fragments, whose observations are (pairs, steps, 2).

    The missing steps of an episode that ended early are zeros: `part.mean` leaves them out.
    """
    ours, theirs = (part.mean(part.observation[..., 0].abs()) for part in (first, second))
    return ours < theirs  # 1: the first is better; 0: the second; 0.5 would be a tie


budget = {"labels": 200, "rounds": 8, "environment_steps": 500}
algorithm = birl_ext.SoBiRL(Rail, nearer, episode_steps=50, fragment=10, evaluate_every=2, **budget)
algorithm.learn()
returns = [row["true_return"] for row in algorithm.history if "true_return" in row]
print("true return:", ", ".join(f"{found:.0f}" for found in returns))

path = algorithm.save("rail")
again = birl_ext.SoBiRL.load(path, environment=Rail)
print("at rest, far to the left:", ["left", "stay", "right"][again.predict([-1.5, 0.0])])
