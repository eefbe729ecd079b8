"""Editing stored samples: a run of inversions becomes a run of edited pictures."""
