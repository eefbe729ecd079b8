"""The work on one shard: reading, computing, scoring, writing, committing."""
