"""Docker registry credentials and token authentication."""
