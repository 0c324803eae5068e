"""Dispatcher ops and their derivatives; one file per op. Private: the public functions are in
`functional`.
"""
