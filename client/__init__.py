"""One site: its records, its training, its side of a round."""
