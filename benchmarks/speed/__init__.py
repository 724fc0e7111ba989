"""Run the chain and other runtimes on the same weights and inputs.

Programs in this folder import this package first: it makes the project importable from a checkout that is not
installed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

try:
    import bridge_stg
except ModuleNotFoundError:
    sys.path.append(str(ROOT))
    try:
        import bridge_stg
    except ModuleNotFoundError:  # a peer's environment, without the project's dependencies
        bridge_stg = None  # type: ignore[assignment]
