"""Which samples are alike: `open_index(...).search(vectors, k, where)`, and near-duplicates."""

from tasks.similar.index import Index, open_index

__all__ = ["Index", "open_index"]
