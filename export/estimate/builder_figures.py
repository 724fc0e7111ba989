"""Activation memory of a bundle's engines as TensorRT-RTX's builder reports it, for the nearest GPU that it knows.

The builder needs no GPU. Figures are kept in the user's cache, since a large graph takes minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from bridge_stg.export.engines.compile import compile_graph
from bridge_stg.export.engines.profiles import GraphProfiles
from bridge_stg.export.engines.select_builds import build_bytes, has_weight_only, load_tensorrt, weight_bytes
from bridge_stg.runtime.backends.tensorrt.engine_cache import graph_digest, profile_digest
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec, canonical_sha256
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.memory import available_bytes

KNOWN_SMS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT-RTX compiles for."""


class BuilderFigures:
    """Figures of the installed TensorRT-RTX. Raises EngineError if it is not installed.

    Args:
        compile_missing: whether graphs without a kept figure are compiled; otherwise only kept figures are used.
        say: called with a line before a graph is compiled.
    """

    def __init__(self, *, compile_missing: bool = True, say: Callable[[str], Any] = lambda line: None) -> None:
        self._tensorrt: ModuleType = load_tensorrt("tensorrt_rtx")
        self._compile_missing, self._say = compile_missing, say
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._folder = Path(base) / "bridge-stg" / "activations"

    def activation(self, bundle: Bundle, graph: GraphSpec, profiles: GraphProfiles, sm: int) -> int | None:
        """Return the bytes of the largest profile; None if this machine lacks the memory, or the builder refuses."""
        nearest = min(KNOWN_SMS, key=lambda known: abs(known - sm))
        key = {
            "graph": graph_digest(graph), "profiles": profile_digest(profiles.profiles, profiles.capacity),
            "sm": nearest, "version": str(self._tensorrt.__version__),
        }  # fmt: skip
        file = self._folder / f"{canonical_sha256(key, without='')[:16]}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            return max(map(int, json.loads(file.read_text(encoding="utf-8"))["activation_bytes"]))
        left = available_bytes()
        needed = build_bytes(weight_bytes(graph), 0, weight_only=has_weight_only(graph))
        if not self._compile_missing or (left is not None and left < needed):
            return None
        self._say(f"compiling {graph} for SM {nearest}, to read its activation memory")
        try:
            compiled = compile_graph(
                self._tensorrt, bundle.graph_path(graph.name, graph.variant), profiles.profiles,
                capacity=profiles.capacity, sms=(nearest,),
            )  # fmt: skip
        except EngineError as error:
            self._say(str(error))
            return None
        if not compiled.activations:
            return None
        with suppress(OSError):  # a read-only cache
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(key | {"activation_bytes": compiled.activations}), encoding="utf-8")
        return max(compiled.activations)
