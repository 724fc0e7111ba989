"""Watch a live stream: read, sample, window, answer, report events."""
