"""Memory and hours of a training, before it starts."""
