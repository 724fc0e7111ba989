"""Bridge-STG: video grounding, exported to the edge (importing this package loads nothing heavy)."""

__version__ = "0.1.0"
