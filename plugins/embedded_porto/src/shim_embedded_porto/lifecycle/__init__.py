"""What happens to containers: they are created, start, stop, die and are remembered."""
