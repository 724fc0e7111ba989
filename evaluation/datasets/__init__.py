"""Readers of annotated datasets, one file per format."""
