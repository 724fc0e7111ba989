"""Compare the graphs of a bundle with recorded golden cases, boundary by boundary."""
