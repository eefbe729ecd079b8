"""What leaves a run in other forms."""
