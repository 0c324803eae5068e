"""A policy at work in environments: collected, evaluated, filmed."""
