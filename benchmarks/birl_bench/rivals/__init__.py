"""Everyone else: what a user writes, what an expert writes, and the packages that exist.

Each is as good as we can make it. All stop at V where birl_ext also returns Q, π, log π and a
certificate, and each is asked for no more accuracy than birl_ext certifies.
"""
