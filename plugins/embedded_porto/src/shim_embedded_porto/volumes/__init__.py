"""Volumes, and the layers and storages they are made of."""
