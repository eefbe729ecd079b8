"""What `refinery browse` shows of runs: read-only views and data, without a server."""
