"""Container properties: what can be asked of a container, and set on it."""
