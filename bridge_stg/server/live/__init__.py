"""Live streams of the server: watches and their newest frame."""
