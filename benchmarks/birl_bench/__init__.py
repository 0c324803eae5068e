"""Is birl_ext as fast as it says, and against whom?

``birl bench`` runs it. One file per question in ``cases``; what else answers it in ``rivals``;
what is claimed, as data, in ``requirements``.
"""
