"""Train on annotated clips: data, losses, loop."""
