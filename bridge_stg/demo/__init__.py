"""The demo: synthetic clips, the tiny model, its training and its held-out scores."""
