"""Oracles: slow, plain and independent. Nothing here is imported by the package at run time.

`float64` is NumPy loops; `multiprecision` is mpmath at fifty digits, with exact gradients. They
share no code and no formula layout with the fast path, so agreement means something.
"""
