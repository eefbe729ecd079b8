"""A run's folder: ledger, markers, manifest, Parquet parts, and how they are read back."""
