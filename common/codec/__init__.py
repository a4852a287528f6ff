"""From an adapter to what travels."""
