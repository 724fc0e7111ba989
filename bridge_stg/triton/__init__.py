"""Serve a bundle in NVIDIA Triton: model repository and Python model."""
