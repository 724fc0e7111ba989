"""Select the engines to build for a target, and check that they can be built: variant, precision, support, memory.

Compiles nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bridge_stg.export.engines import targets
from bridge_stg.export.engines.profiles import Deployment, GraphProfiles, profiles_of
from bridge_stg.export.engines.support import require
from bridge_stg.export.engines.targets import PRIMITIVE_ONLY_BELOW, EngineTarget
from bridge_stg.export.graph.blocks import QUANTIZED_FORMS
from bridge_stg.runtime.backends.tensorrt import engine_cache
from bridge_stg.runtime.backends.tensorrt.engine_cache import FAMILIES, EngineKey
from bridge_stg.runtime.backends.tensorrt.library import MODULES
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.machine import machine
from bridge_stg.runtime.host.memory import available_bytes, gigabytes
from bridge_stg.runtime.host.packages import install_command, version_numbers

OPTIONS = {"attention": "decomposable", "network": "strongly typed", "tf32": "off"}
"""Settings of every engine, as its key has them."""
BASE_BYTES, COPIES, WEIGHT_ONLY_COPIES = 500 * 10**6, 2.4, 3.5
"""Memory of a compilation: a constant, and the number of copies of the weights at its peak, without the pages of their
file, which the system can drop (docs/engines.md)."""
LEAST_WORKSPACE = 256 * 2**20
BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Build:
    """One engine to build."""

    graph: GraphSpec
    target: EngineTarget
    profiles: GraphProfiles
    tensorrt: ModuleType

    def key(self) -> EngineKey:
        """Return the key of the engine."""
        return EngineKey(
            family=self.target.family,
            version=str(self.tensorrt.__version__),
            sms=self.target.sms,
            machine=engine_cache.machine_name(),
            options=OPTIONS,
            graph=engine_cache.graph_digest(self.graph),
            profiles=engine_cache.profile_digest(self.profiles.profiles, self.profiles.capacity),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the graph and its data files, including those that variants share."""
        return weight_bytes(self.graph)

    @property
    def cache_bytes(self) -> int:
        """Bytes of one row of the KV cache at the engine's capacity."""
        return cache_row_bytes(self.graph, self.profiles)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the target that remain for tensors between layers."""
        return max(LEAST_WORKSPACE, self.target.memory - self.weight_bytes - self.cache_bytes)


def weight_bytes(graph: GraphSpec) -> int:
    """Return the bytes of a graph and its data files, including those that variants share."""
    return graph.size + sum(entry.size for entry in graph.data)


def cache_row_bytes(graph: GraphSpec, profiles: GraphProfiles) -> int:
    """Return the bytes of one row of a graph's KV cache at the engine's capacity; 0 without a cache."""
    cache = graph.cache
    if cache is None:
        return 0
    largest = max(ranges.get("S", (0, 0, 0))[2] for ranges in profiles.profiles.values())
    positions = profiles.capacity or largest
    return 2 * cache.layers * cache.kv_heads * cache.head_dim * positions * BYTES[cache.dtype]


def has_weight_only(graph: GraphSpec) -> bool:
    """Return whether a recipe of a graph quantizes only weights."""
    return not {"w8", "w4"}.isdisjoint(graph.precision.replace("-", " ").split())


def build_bytes(weights: int, activations: int, *, weight_only: bool) -> int:
    """Return the memory of a compilation; `activations` are 0 where no GPU shares the memory to time kernels in."""
    return BASE_BYTES + int((WEIGHT_ONLY_COPIES if weight_only else COPIES) * weights) + activations


def select_builds(
    bundle: Bundle,
    name: str,
    *,
    graphs: Sequence[str],
    variant: str | None,
    precision: str | None,
    deployment: Deployment,
    overrides: Mapping[str, Any] | None,
    where: str,
    say: Callable[[str], Any],
    family: str | None,
    exact_profiles: Mapping[str, GraphProfiles] | None,
) -> list[Build]:
    """Return the engines of one target, checked except for memory. See `build_engines` for arguments and errors."""
    named = targets.find_target(name) if name != "this" else None
    if precision is not None and named is not None:
        targets.check_precision(named, precision)
    target, tensorrt = _target_here(named, family)
    version = str(tensorrt.__version__)
    chosen = [bundle.graph(graph_name, variant or target.variant) for graph_name in graphs or bundle.manifest.graphs]
    if precision is not None and all(graph.precision.split()[0] != precision.split()[0] for graph in chosen):
        found = ", ".join(f"{graph} is {graph.precision}" for graph in chosen)
        message = f"{bundle.path}: {found}, unlike --precision {precision}. {_how_to_get(precision)}"
        raise EngineError("engine.wrong_precision", message)
    builds = []
    for graph in chosen:
        targets.check_precision(target, graph.precision)
        _check_variant(target, graph, version)
        for sentence in _check_support(target, graph, version):
            say(sentence)
        profiles = (exact_profiles or {}).get(graph.name)
        if profiles is None:
            profiles = profiles_of(graph, bundle.manifest.spec, deployment=deployment, overrides=overrides, where=where)
        builds.append(Build(graph, target, profiles, tensorrt))
    return builds


def _how_to_get(precision: str) -> str:
    word = precision.split(maxsplit=1)[0]
    if word in ("fp32", "fp16", "bf16"):
        return f"Export the checkpoint with --dtype {word}"
    return "Make a bundle with `calibrate`" if word in QUANTIZED_FORMS else "No bundle of this project has it"


def _target_here(named: EngineTarget | None, family: str | None) -> tuple[EngineTarget, ModuleType]:
    """Return the target (by default this machine's GPU), narrowed to this machine, and the TensorRT to compile with."""
    if named is not None and named.ahead_of_time:
        tensorrt = load_tensorrt(named.family)
        return targets.check_installed(named, version=str(tensorrt.__version__), sm=None), tensorrt
    here = machine()
    device = next(iter(here.devices), None)
    if named is not None:
        sm = None if device is None else device.sm
        targets.check_device(named, sm)  # before the advice to install a package
        tensorrt = load_tensorrt(named.family)
        return targets.check_installed(named, version=str(tensorrt.__version__), sm=sm), tensorrt
    if device is None:
        message = f"target this: this machine has no GPU ({here.device_problem}). {targets.ON_THE_DEVICE}"
        raise EngineError("engine.no_device", message)
    family = family or next((name for name in MODULES if _importable(name)), "tensorrt")
    tensorrt = load_tensorrt(family)
    found = targets.this_target(family=family, version=str(tensorrt.__version__), sm=device.sm, memory=device.memory)
    return found, tensorrt


def load_tensorrt(family: str) -> ModuleType:
    """Import the package of a TensorRT family; raise EngineError if it is not installed."""
    for name in MODULES[family]:
        with suppress(ImportError):
            return importlib.import_module(name)
    extra, other = ("rtx", "") if family == "tensorrt_rtx" else ("tensorrt", ", or use the package of JetPack")
    message = f"{FAMILIES[family]} cannot be imported: {install_command(extra, 'calibrate')}{other}"
    raise EngineError("engine.not_installed", message)


def _importable(family: str) -> bool:
    with suppress(EngineError):
        return bool(load_tensorrt(family))
    return False


def _check_variant(target: EngineTarget, graph: GraphSpec, version: str) -> None:
    old = target.family == "tensorrt" and version_numbers(version) < PRIMITIVE_ONLY_BELOW
    takes = ("primitive",) if old else ("standard", "primitive")
    if graph.variant not in takes:
        found = f"target {target.name} with {FAMILIES[target.family]} {version} takes the variant {' or '.join(takes)}"
        raise EngineError("engine.unsupported_variant", f"{found}, not {graph.variant}. Leave --variant out")


def _check_support(target: EngineTarget, graph: GraphSpec, version: str) -> list[str]:
    """Return a sentence per recipe of a quantized graph that falls back; raise if the target does not support one."""
    words = graph.precision.split()
    if words[0] not in QUANTIZED_FORMS:
        return []
    name = "tensorrt-rtx" if target.ahead_of_time else f"tensorrt-{11 if version_numbers(version) >= (11,) else 10}"
    floats = words[2] if len(words) > 2 else "fp32"
    found = [require(name, recipe, graph.variant, floats) for recipe in words[1].split("-") if recipe != "float"]
    return [sentence for sentence in found if sentence]


def check_room(build: Build, activations: int = LEAST_WORKSPACE) -> None:
    """Raise EngineError if this machine lacks the memory to compile a graph, or the target to run it.

    `activations` are the bytes of tensors between layers, as far as they are known.
    """
    weights, row = build.weight_bytes, build.cache_bytes
    if weights + row + activations > build.target.memory:
        needs = f"{build.graph} needs {gigabytes(weights)} for its weights, {gigabytes(activations)} for activations"
        needs += f" and {gigabytes(row)} per row of its KV cache" if row else ""
        advice = "Use a smaller precision, a smaller --max-frames, or --no-check-memory"
        has = f"target {build.target.name} has {gigabytes(build.target.memory)}"
        raise EngineError("engine.out_of_memory", f"{needs}, and {has}. {advice}")
    needed = build_bytes(
        weights, 0 if build.target.ahead_of_time else activations, weight_only=has_weight_only(build.graph)
    )
    left = available_bytes()
    if left is not None and left < needed:
        needs = (
            f"compiling {build.graph} needs about {gigabytes(needed)} of memory, but {gigabytes(left)} are available"
        )
        other = "a machine with more" if build.target.ahead_of_time else "a smaller precision or --max-frames"
        advice = f"Close other programs, or use {other}; --no-check-memory skips this check"
        raise EngineError("engine.out_of_memory", f"{needs}. {advice}")
