"""The runtime and image calls of CRI on Porto."""
