"""Proof that a run is whole."""
