"""Bridge-STG: video grounding, exported to the edge (importing this package loads nothing heavy)."""

import os

__version__ = "0.1.0"

# onnxruntime starts its telemetry when it is imported, by us or by a package that we use; later is too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
