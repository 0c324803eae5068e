"""Every bilevel method on the same work, at equal budgets."""
