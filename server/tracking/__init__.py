"""A run's events for tools that draw experiments: as scalars, to TensorBoard's files or an MLflow server."""
