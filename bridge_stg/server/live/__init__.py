"""Live streams of the server: watches, their newest frame, and Motion JPEG."""
