"""Compute ratios, tables and plots from measured times."""
