"""An oracle: slow, plain and independent. Nothing here is imported by the package at run time.

`float64` is NumPy loops. It shares no code and no formula layout with the fast path, so agreement
means something. The tests have another one, of 512 bits, in `tests/oracle`.
"""
