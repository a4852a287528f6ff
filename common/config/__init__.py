"""What the sides agree on, read from TOML and checked at once."""
