"""Inputs of the speed benchmark: bundles, clips and recorded calls."""
