"""Learning a reward from a teacher's preferences in a Gymnasium environment.

`config` is imported by the command line and needs neither torch nor gymnasium; `job` needs both.
"""
