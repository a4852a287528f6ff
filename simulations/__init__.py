"""A whole federation on one machine, and what a person sees of it."""
