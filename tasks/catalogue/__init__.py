"""Finished and unfinished runs to work with: opened in Python, compared, drawn again."""
