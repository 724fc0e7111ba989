"""Find the demo bundle, or export it from the demo checkpoint of a checkout."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridge_stg
from bridge_stg.runtime.errors import BundleError

SOURCE_TREE = Path(bridge_stg.__file__).resolve().parents[1]
BUILT = Path("build/demo/bundle")
CHECKPOINT = Path("assets/demo/checkpoint")


def cached_bundle() -> Path:
    """Return where the demo bundle lies in the user's cache, whether or not it is there."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bridge-stg" / bridge_stg.__version__ / "demo"


def demo_bundle(*, progress: Callable[..., Any] | None = None) -> Path:
    """Return a demo bundle: ./build/demo/bundle, else the user's cache, else one that is exported into that cache.

    Raises:
        BundleError: there is none, and it cannot be exported here; the message says what to install or to give.
    """
    cached = cached_bundle()
    for candidate in (BUILT, cached):
        if (candidate / "manifest.json").is_file():
            return candidate
    checkpoints = [root / CHECKPOINT for root in (Path(), SOURCE_TREE) if (root / CHECKPOINT).is_dir()]
    if not checkpoints:
        raise BundleError(
            "bundle.not_given",
            f"No bundle was given, and there is no demo bundle in {BUILT} or {cached}. Name one with --bundle, "
            "or run `make demo` in a checkout of the project and use its build/demo/bundle.",
        )
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers", "onnx", "onnxscript")):
        raise BundleError(
            "bundle.not_given",
            f"No bundle was given, and there is no demo bundle in {BUILT} or {cached}. Exporting it from "
            f'{checkpoints[0]} needs torch: pip install "bridge-stg[cpu,export]", or name a bundle with --bundle.',
        )
    from bridge_stg.export.export_bundle import export_bundle

    cached.parent.mkdir(parents=True, exist_ok=True)
    return export_bundle(checkpoints[0], cached, overwrite=True, progress=progress)
