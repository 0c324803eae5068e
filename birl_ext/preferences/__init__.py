"""Comparisons of behaviour: fragments, teachers, and rewards that explain their answers."""
