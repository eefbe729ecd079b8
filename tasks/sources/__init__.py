"""Readers of the three kinds of input: loose files, WebDataset tars, Parquet."""
