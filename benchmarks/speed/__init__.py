"""The speed benchmark: runners of the chain and of its peers, on the same weights and inputs, in one run.

Programs of this folder import it first: in a checkout that is not installed, it lets them find the project.
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
    except ModuleNotFoundError:  # a peer's environment, which lacks what the project needs
        bridge_stg = None  # type: ignore[assignment]
