"""Collect activation statistics: samples, instrumented graphs, recorded calls."""
