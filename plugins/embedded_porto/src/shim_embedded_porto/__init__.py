"""A stand-in for portod: Porto's protocol, containers by crun."""
