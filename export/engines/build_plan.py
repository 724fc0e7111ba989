"""Which engines a build makes, and whether it can: target, variant, precision, support, memory. Compiles nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bridge_stg.export.engines.profiles import GraphProfiles, profiles_of
from bridge_stg.export.engines.support import require
from bridge_stg.export.engines.targets import (
    PRIMITIVE_ONLY_BELOW,
    EngineTarget,
    ahead_of_time,
    check_device,
    check_installed,
    check_precision,
    find_target,
    this_target,
    version_numbers,
)
from bridge_stg.runtime.backends.tensorrt.engine_cache import (
    FAMILIES,
    EngineKey,
    graph_digest,
    machine_name,
    profile_digest,
)
from bridge_stg.runtime.backends.tensorrt.library import MODULES
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.machine import machine
from bridge_stg.runtime.host.memory import available_bytes, gigabytes

OPTIONS = {"attention": "decomposable", "network": "strongly typed", "tf32": "off"}
"""Settings of every engine, as they stand in its key."""
BASE_BYTES, COPIES = 500 * 10**6, 3.2
"""Memory of a compilation: what it takes whatever the graph, and how often the weights are held at its worst moment
(docs/engines.md)."""
LEAST_WORKSPACE = 256 * 2**20
BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Build:
    """What is to be built: one engine."""

    graph: GraphSpec
    target: EngineTarget
    profiles: GraphProfiles
    tensorrt: ModuleType

    def key(self) -> EngineKey:
        """Return the key that the engine will have."""
        return EngineKey(
            family=self.target.family,
            version=str(self.tensorrt.__version__),
            sms=self.target.sms,
            machine=machine_name(),
            options=OPTIONS,
            graph=graph_digest(self.graph),
            profiles=profile_digest(self.profiles.profiles, self.profiles.capacity),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the graph and its data files; what variants share counts for each."""
        return self.graph.size + sum(entry.size for entry in self.graph.data)

    @property
    def cache_bytes(self) -> int:
        """Bytes of one row of the KV cache at the engine's capacity."""
        cache = self.graph.cache
        if cache is None:
            return 0
        largest = max(ranges.get("S", (0, 0, 0))[2] for ranges in self.profiles.profiles.values())
        positions = self.profiles.capacity or largest
        return 2 * cache.layers * cache.kv_heads * cache.head_dim * positions * BYTES[cache.dtype]

    @property
    def workspace_bytes(self) -> int:
        """What the target leaves for tensors between layers."""
        return max(LEAST_WORKSPACE, self.target.memory - self.weight_bytes - self.cache_bytes)

    @property
    def needed_bytes(self) -> int:
        """Estimate of the memory that compiling takes on this machine."""
        return BASE_BYTES + int(COPIES * self.weight_bytes)


def planned(
    bundle: Bundle,
    name: str,
    graphs: Sequence[str],
    variant: str | None,
    precision: str | None,
    overrides: Mapping[str, Any] | None,
    where: str,
    say: Callable[[str], Any],
    *,
    family: str | None = None,
    exactly: Mapping[str, GraphProfiles] | None = None,
) -> list[Build]:
    """Return the engines that one target needs, all checked but memory. Arguments and errors: see `build_engines`."""
    asked = find_target(name) if name != "this" else None
    if precision is not None and asked is not None:
        check_precision(asked, precision)
    target, tensorrt = _target_here(asked, family)
    chosen = [bundle.graph(graph_name, variant or target.variant) for graph_name in graphs or bundle.manifest.graphs]
    if precision is not None and all(graph.precision.split()[0] != precision.split()[0] for graph in chosen):
        found = ", ".join(f"{graph} is {graph.precision}" for graph in chosen)
        raise EngineError(
            f"{bundle.path}: --precision {precision} was asked for, and {found}. Precision is in the graphs: "
            f"{_how_to_get(precision)}"
        )
    builds = []
    for graph in chosen:
        check_precision(target, graph.precision)
        _check_variant(target, graph, str(tensorrt.__version__))
        for sentence in _supported(target, graph, str(tensorrt.__version__)):
            say(sentence)
        profiles = (exactly or {}).get(graph.name)
        if profiles is None:
            profiles = profiles_of(graph, bundle.manifest.spec, overrides=overrides, where=where)
        builds.append(Build(graph, target, profiles, tensorrt))
    return builds


def _how_to_get(precision: str) -> str:
    word = precision.split()[0]
    if word in ("fp32", "fp16", "bf16"):
        return f"export the checkpoint with --dtype {word}"
    return "make a bundle with `calibrate`" if word in ("int8", "int4") else "no bundle of this project has it"


def _target_here(asked: EngineTarget | None, family: str | None) -> tuple[EngineTarget, ModuleType]:
    """Return the target, narrowed to this machine, and the TensorRT that compiles for it.

    Args:
        asked: None: what is here, with the TensorRT of `family`, or with the first that is installed.
    """
    if asked is not None and asked.ahead_of_time:
        tensorrt = load_tensorrt(asked.family)
        return check_installed(asked, version=str(tensorrt.__version__), sm=None), tensorrt
    here = machine()
    device = here.devices[0] if here.devices else None
    if asked is not None:
        sm = None if device is None else device.sm
        check_device(asked, sm)  # ahead of advice to install something
        tensorrt = load_tensorrt(asked.family)
        return check_installed(asked, version=str(tensorrt.__version__), sm=sm), tensorrt
    if device is None:
        raise EngineError(
            f"target this is the GPU of this machine, and there is none ({here.device_problem}). Run this command on "
            f"the device, or compile ahead of time for one of {', '.join(ahead_of_time())}"
        )
    family = family or next((name for name in MODULES if _importable(name)), "tensorrt")
    tensorrt = load_tensorrt(family)
    found = this_target(family=family, version=str(tensorrt.__version__), sm=device.sm, memory=device.memory)
    return found, tensorrt


def load_tensorrt(family: str) -> ModuleType:
    """Import a family's package.

    Raises:
        EngineError: it is not installed.
    """
    for name in MODULES[family]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    extra = "rtx" if family == "tensorrt_rtx" else "tensorrt"
    jetpack = "" if family == "tensorrt_rtx" else ", or use the one that JetPack brings"
    raise EngineError(
        f'{FAMILIES[family]} cannot be imported. Install it: pip install "bridge-stg[{extra},calibrate]"{jetpack}'
    )


def _importable(family: str) -> bool:
    try:
        load_tensorrt(family)
    except EngineError:
        return False
    return True


def _check_variant(target: EngineTarget, graph: GraphSpec, version: str) -> None:
    old = target.family == "tensorrt" and version_numbers(version) < PRIMITIVE_ONLY_BELOW
    takes = ("primitive",) if old else ("standard", "primitive")
    if graph.variant not in takes:
        raise EngineError(
            f"target {target.name} with {FAMILIES[target.family]} {version} takes the variant {' or '.join(takes)}, "
            f"not {graph.variant}. Leave --variant out" + (", or install TensorRT 10.15 or later" if old else "")
        )


def _supported(target: EngineTarget, graph: GraphSpec, version: str) -> list[str]:
    """Return what to tell of a quantized graph that falls back; raise where the table of support refuses it."""
    words = graph.precision.split()
    if words[0] not in ("int8", "int4"):
        return []
    name = "tensorrt-rtx" if target.ahead_of_time else f"tensorrt-{11 if version_numbers(version) >= (11,) else 10}"
    floats = words[2] if len(words) > 2 else "fp32"
    found = [require(name, recipe, graph.variant, floats) for recipe in words[1].split("-") if recipe != "float"]
    return [sentence for sentence in found if sentence]


def check_room(build: Build) -> None:
    """Stop where this machine cannot compile a graph, or the target cannot hold it.

    Raises:
        EngineError: the message says what is needed, what is there, and what to do.
    """
    weights, row = build.weight_bytes, build.cache_bytes
    if weights + row + LEAST_WORKSPACE > build.target.memory:
        cache = f" and {gigabytes(row)} for a row of its KV cache" if row else ""
        raise EngineError(
            f"{build.graph} takes {gigabytes(weights)} for its weights{cache}, and target {build.target.name} has "
            f"{gigabytes(build.target.memory)} for all. Use a smaller precision, a smaller `capacity` in --profiles, "
            "or --no-check-memory for a device with more"
        )
    needed, left = build.needed_bytes, available_bytes()
    if left is not None and left < needed:
        raise EngineError(
            f"compiling {build.graph} takes about {gigabytes(needed)} of memory here, and {gigabytes(left)} are "
            "available. Close other programs, or use a machine with more; --no-check-memory tries it all the same"
        )
