"""Other methods of bilevel reinforcement learning, with the interface of ours."""
