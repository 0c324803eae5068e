"""Answers that share nothing with the package: ball arithmetic of hundreds of bits, NumPy loops."""
