"""Models that can be started anywhere."""
