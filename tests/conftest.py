"""Let every test import `bridge_stg.runtime` … from the checkout, where these folders lie beside bridge_stg/."""

from __future__ import annotations

from pathlib import Path

import bridge_stg

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in bridge_stg.__path__:
    bridge_stg.__path__.append(ROOT)
