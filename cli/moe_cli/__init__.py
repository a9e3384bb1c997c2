"""moectl."""
