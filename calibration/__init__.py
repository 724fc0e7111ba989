"""Calibration: quantize a float bundle with samples, and measure the effect on answers, speed and size."""
