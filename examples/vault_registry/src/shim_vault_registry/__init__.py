"""An example of a portoshim plugin: registry tokens from a file-based vault."""
