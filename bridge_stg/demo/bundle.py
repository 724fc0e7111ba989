"""Find the demo bundle, or export it from the demo checkpoint of a source tree; find its sample clip."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import bridge_stg
from bridge_stg.runtime.errors import BundleError, CheckpointError
from bridge_stg.runtime.host.packages import install_command

SOURCE_TREE = Path(bridge_stg.__file__).resolve().parents[1]
BUILT = Path("build/demo/bundle")
CHECKPOINT = Path("assets/demo/checkpoint")
SAMPLE = Path("assets/demo/clips/2-moving.mp4")


def demo_checkpoint(path: Path = CHECKPOINT) -> Path:
    """Return a checkpoint of the source tree, from the working folder or next to this package.

    Raises CheckpointError if it is in neither.
    """
    for root in (Path(), SOURCE_TREE):
        if (root / path).is_dir():
            return root / path
    raise CheckpointError(
        "checkpoint.missing_file", f"{path}: no such folder; run this in a source tree of the project"
    )


def demo_bundle(*, progress: Callable[[str], None] = lambda stage: None) -> Path:
    """Return a demo bundle: ./build/demo/bundle, else the one in the user's cache, which is exported if missing.

    Raises BundleError, which says what to install or pass, if no bundle exists and it cannot be exported here.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cached = Path(cache) / "bridge-stg" / bridge_stg.__version__ / "demo"
    for candidate in (BUILT, cached):
        if (candidate / "manifest.json").is_file():
            return candidate
    checkpoints = [root / CHECKPOINT for root in (Path(), SOURCE_TREE) if (root / CHECKPOINT).is_dir()]
    missing = f"No bundle was given, and no demo bundle exists in {BUILT} or {cached}."
    if not checkpoints:
        hint = "Pass one with --bundle, or run `make demo` in a source tree of the project and use its"
        raise BundleError("bundle.not_given", f"{missing} {hint} {BUILT}.")
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers", "onnx", "onnxscript")):
        hint = f"Exporting it from {checkpoints[0]} needs torch: {install_command('cpu', 'export')}, or pass --bundle."
        raise BundleError("bundle.not_given", f"{missing} {hint}")
    from bridge_stg.export.export_bundle import export_bundle

    cached.parent.mkdir(parents=True, exist_ok=True)
    return export_bundle(checkpoints[0], cached, overwrite=True, progress=progress)


def demo_sample(bundle: Path) -> Path | None:
    """Return a clip to try if a bundle has the model of the source tree's demo checkpoint; None otherwise.

    Raises BundleError if its manifest cannot be read.
    """
    from bridge_stg.runtime.bundle.bundle import read_manifest

    clip, config, spec = SOURCE_TREE / SAMPLE, SOURCE_TREE / CHECKPOINT / "config.json", read_manifest(bundle).spec
    if spec.knows is None or not clip.is_file() or not config.is_file():
        return None
    summary: str = json.loads(config.read_bytes())["knows"]["summary"]
    return clip if spec.knows.summary == summary else None
