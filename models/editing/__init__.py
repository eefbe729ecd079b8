"""Edits of codes.

direction.py: one direction of the latent space with its unit, and its file.
"""
