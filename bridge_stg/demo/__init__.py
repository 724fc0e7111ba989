"""The demo: synthetic clips, a tiny model, its training and its scores on held-out clips."""
