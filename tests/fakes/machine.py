"""A machine with a fake GPU and fake TensorRT: packages, device, and engines in the user's cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.runtime.backends.tensorrt import library as tensorrt_library
from bridge_stg.runtime.backends.tensorrt.engine_cache import (
    PLAN,
    EngineDevice,
    EngineEntry,
    EngineKey,
    engine_folders,
    graph_digest,
    profile_digest,
)
from bridge_stg.runtime.backends.tensorrt.engine_store import new_engine, publish
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.device import cuda
from bridge_stg.runtime.device import resize as device_resize
from bridge_stg.runtime.host import packages
from tests.fakes.cuda import FakeCuda
from tests.fakes.kernels import FakeDriver, FakeNvrtc
from tests.fakes.tensorrt import FakeTensorRT, make_plan

VERSION = "10.15.1"
CHAIN_PROFILES: Mapping[str, list[dict[str, tuple[int, int, int]]]] = {
    "vision_encoder": [
        {"G": (1, 4, 16), "height": (32, 192, 512), "width": (32, 192, 512), "N": (4, 144, 512)},
    ],
    "language_model": [
        {"B": (1, 1, 16), "L": (1, 64, 1024), "K": (1, 1, 4), "V": (2, 512, 8192), "S": (256, 512, 8192)},
        {"B": (1, 1, 16), "L": (1, 1, 8), "K": (1, 1, 4), "V": (2, 2, 2), "S": (256, 512, 8192)},
    ],
    "spatial_decoder": [{"B": (1, 1, 16), "F": (1, 32, 64), "h": (1, 12, 64), "w": (1, 12, 64)}],
}


class FakeMachine:
    """The fake machine that `pretend` installs.

    Attributes:
        cuda, module: the fake CUDA runtime and the fake TensorRT.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path, *, family: str, eager: tuple[int, ...]) -> None:
        self.family = family
        self.cuda = FakeCuda(eager=eager)
        self.module = FakeTensorRT(self.cuda, VERSION)
        package = "tensorrt" if family == "tensorrt" else "tensorrt-rtx-cu13-bindings"
        installed = packages.installed_version

        def version(name: str) -> str | None:
            return VERSION if name == package else installed(name)

        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(packages, "installed_version", version)
        monkeypatch.setattr(cuda, "_cuda_python", lambda: self.cuda)
        monkeypatch.setattr(tensorrt_library, "_import", lambda name: self.module)
        monkeypatch.setattr(device_resize, "load_bindings", lambda: (FakeNvrtc(), FakeDriver(self.cuda)))

    def build(self, bundle: Bundle, variant: str, *, capacity: int = 1024) -> None:
        """Write an engine of every graph to the user's cache."""
        for name in bundle.manifest.graphs:
            self.build_graph(bundle, bundle.graph(name, variant), CHAIN_PROFILES[name], capacity=capacity)

    def build_graph(self, bundle: Bundle, graph: GraphSpec, profiles: Any, *, capacity: int) -> EngineEntry:
        patch = bundle.manifest.spec.vision.patch_size
        plan = make_plan(
            bundle.graph_path(graph.name, graph.variant),
            graph,
            profiles,
            capacity=capacity,
            sizes={"h": f"height // {patch}", "w": f"width // {patch}"} if graph.name == "vision_encoder" else {},
        )
        named = {f"profile {i}": profile for i, profile in enumerate(profiles)}
        device = EngineDevice(self.family, VERSION, 87)
        key = EngineKey(
            device.family, device.version, (device.sm,), device.machine, {}, graph_digest(graph),
            profile_digest(named, capacity),
        )  # fmt: skip
        entry = EngineEntry(
            key, "this", graph.name, graph.variant, graph.precision, named, capacity, graph.inputs, graph.outputs, 0, ""
        )
        with new_engine(engine_folders(bundle)[1]) as partial:
            (partial / PLAN).write_bytes(plan)
            return publish(partial, entry)
