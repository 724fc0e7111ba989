"""Which lowerings the installed onnxruntime runs: the last one for Python 3.10 knows no opset 24."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest

from bridge_stg.runtime.backends.registry import STANDARD_SINCE
from bridge_stg.runtime.host.packages import version_numbers

RUNS_STANDARD = version_numbers(onnxruntime.__version__) >= STANDARD_SINCE
RUNNABLE = {"standard", "primitive"} if RUNS_STANDARD else {"primitive"}


class Lowerings(dict[str, Any]):
    """Graph files by variant; a test that takes `standard` is skipped where onnxruntime cannot run it."""

    def __getitem__(self, variant: str) -> Any:
        if variant == "standard" and not RUNS_STANDARD:
            pytest.skip(f"onnxruntime {onnxruntime.__version__} does not run opset 24")
        return super().__getitem__(variant)
