"""From a run's base and adapter to a compact domain model."""
