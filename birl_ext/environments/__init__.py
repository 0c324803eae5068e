"""Gymnasium environments, one and many, and what they declare."""
