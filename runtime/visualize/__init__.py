"""Draw results: annotated videos and contact sheets."""
