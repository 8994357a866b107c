"""What the demonstration, the benchmark and the tests share. Not installed with anything."""
