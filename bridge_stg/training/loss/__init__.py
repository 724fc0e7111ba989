"""The loss of a clip."""
