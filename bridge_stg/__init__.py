"""Bridge-STG: video grounding, exported to the edge (importing this package loads nothing heavy)."""

import os

__version__ = "0.2.0.dev0"

# Must be set before onnxruntime is imported, by this or another package: the import starts its telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
