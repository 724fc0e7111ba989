"""Evaluate bundles and checkpoints on annotated datasets, and run them over many videos."""
