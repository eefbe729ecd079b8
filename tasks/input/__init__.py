"""What comes in: the plan of an input, its readers, decoding and aligning."""
