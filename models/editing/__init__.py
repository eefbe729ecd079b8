"""Edits of codes.

direction.py: one direction of a latent space with its unit, its file, and how it is applied.
find.py: a direction by name or path.
files.py: raw vectors as the field publishes them.
boundary.py: InterFaceGAN's boundary between two kinds of codes.
ganspace.py, sefa.py: directions without labels: principal components of W, and closed form.
style_text.py: StyleCLIP's global directions in style space from a pair of texts.
"""
