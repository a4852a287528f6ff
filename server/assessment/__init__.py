"""What a model is worth on a data file, and whether one of two is better."""
