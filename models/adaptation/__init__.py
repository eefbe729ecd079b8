"""Other domains for a frozen generator: what one is, its file, and how it is optimised.

token_sets.py: the token sets of the refined layers and their file. domain.py: a domain on disk, and
domains added to inversions.
"""
