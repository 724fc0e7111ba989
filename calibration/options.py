"""The options of a calibration and their choices. Light to import, for the command line: no numpy, no onnx."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_stg.export.engines.support import BACKENDS
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.packages import install_command

RECIPE_NAMES = ("w8a8", "w8", "w4", "fp8", "nvfp4")
GRAPH_RECIPE_NAMES = ("float", *RECIPE_NAMES)
METHODS = ("minmax", "percentile", "entropy", "mse")
"""Ways to find the range of an activation."""

GRAPH_OPTIONS = {"vision": "vision_encoder", "language": "language_model", "spatial": "spatial_decoder"}
"""Option of the command line → the graph whose recipe it sets."""

LOCAL_BACKEND = BACKENDS[0]
"""The backend that the speed gates measure."""

PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "yaml")


@dataclass(frozen=True)
class Options:
    """Options of a calibration.

    Attributes:
        recipe: one of `RECIPE_NAMES`.
        graphs: graph → one of `GRAPH_RECIPE_NAMES`, where it differs from the recipe.
        int8_cache: whether keys and values are stored in int8.
        decode_form: see `GraphRecipe.decode_form`; always off for other backends than onnxruntime on CPU.
        overrides: YAML file with manual decisions, see `overrides.read_overrides`.
        method: one of `METHODS` for all ranges; None: per tensor the one with the least error.
        max_drop: points of a metric that may be lost on the selection samples.
        max_changed: percent of answers that may change on the selection samples.
        force_int8: graphs to quantize even if their speed gate finds no gain.
        backends: backends that the bundle is for, of `BACKENDS`.
        confirm: number of blocks whose sensitivity is measured with the metric.
        max_trials: maximum number of trials of the search for blocks that stay in float.
        seed: seed of the random row choice and of the bootstrap.
        threads: CPU threads of a session; None: the backend decides.
        heads: heads that answer the samples, as for `Grounder.load`.
        text: fields of `TextOptions` for text heads, where they differ from the defaults.
    """

    recipe: str = "w8a8"
    graphs: Mapping[str, str] = field(default_factory=dict)
    int8_cache: bool = False
    decode_form: bool | None = None
    overrides: Path | None = None
    method: str | None = None
    max_drop: float = 1.0
    max_changed: float = 3.0
    force_int8: tuple[str, ...] = ()
    backends: tuple[str, ...] = (LOCAL_BACKEND,)
    confirm: int = 6
    max_trials: int = 24
    seed: int = 0
    threads: int | None = None
    heads: str | None = None
    text: Mapping[str, Any] = field(default_factory=dict)

    @property
    def head_options(self) -> dict[str, Any]:
        """`heads` and `text` as plain values; those that are not set are left out, as in earlier digests."""
        values = {"heads": self.heads, "text": dict(self.text)}
        return {name: value for name, value in values.items() if value}


def load_arguments(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Convert plain values, such as `Options.head_options`, to arguments of `Grounder` and `Grounder.load`."""
    from bridge_stg.runtime.heads.options import TextOptions

    return {**plain, **({"text": TextOptions(**plain["text"])} if "text" in plain else {})}


def require_packages() -> None:
    """Raise BridgeError if a package of the calibration is not installed, without importing it."""
    if missing := [package for package in PACKAGES if not _installed(package)]:
        install = install_command("calibrate", *(["cpu"] if "onnxruntime" in missing else []))
        what = f"calibrate needs the package {missing[0]}, which is not installed: {install}"
        raise BridgeError("host.missing_package", what)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
