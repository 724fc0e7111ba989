"""Quantize graphs: ranges, smoothing, rounding, packing, writing."""
