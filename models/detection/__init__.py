"""Faces in photographs: where they are, and their five points."""
