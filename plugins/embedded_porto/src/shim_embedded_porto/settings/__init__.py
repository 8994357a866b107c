"""The values of container properties: how each is parsed, checked and printed. No I/O but looks at the machine."""
