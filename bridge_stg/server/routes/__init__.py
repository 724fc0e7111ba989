"""Routes of the server, one file per group of paths."""
