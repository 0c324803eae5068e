"""Lower-level solvers that learn from samples of an environment."""
