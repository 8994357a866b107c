"""Control groups: Porto's layout in the kernel's hierarchies, version 1 or 2 or both side by side."""
