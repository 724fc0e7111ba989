"""Which TensorRT engine belongs to a graph on a device: keys, what is written beside an engine, where it is found.

An engine is a folder `<target key>/<graph>.<variant>.<digest>/` that holds `engine.plan` and `engine.json`. It lies
below the bundle's engines/, or below the user's cache if the bundle is read-only. Whether it fits is decided from
engine.json alone, before TensorRT sees a byte of the plan. Knows nothing of TensorRT.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_stg.runtime.bundle.bundle import ENGINES, HASHED_BYTES_ON_LOAD, Bundle, file_sha256
from bridge_stg.runtime.bundle.manifest import GraphSpec, TensorSpec, canonical_sha256
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import EngineError

PLAN, ABOUT = "engine.plan", "engine.json"
SCHEMA_VERSION = 1
FAMILIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""Engines of one family do not load in the other."""

Profiles = Mapping[str, Mapping[str, tuple[int, int, int]]]
"""By name, in the order of the engine's profile indices: of each symbol the least, usual and largest size."""


def machine_name() -> str:
    """Return the operating system and processor that a plan is bound to, such as `linux-aarch64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


@dataclass(frozen=True)
class EngineDevice:
    """What an engine must fit.

    `family` is a key of `FAMILIES`, `version` the installed package's, `sm` the GPU's compute capability (87 is 8.7).
    """

    family: str
    version: str
    sm: int
    machine: str = field(default_factory=machine_name)

    def __str__(self) -> str:
        return f"{FAMILIES.get(self.family, self.family)} {self.version} on SM {self.sm}, {self.machine}"


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on. Two engines of one key are interchangeable.

    `sms` are the compute capabilities that it runs on: one where it is built on the device, the target's list where it
    is built ahead of time. `options` are the builder's settings that change what the engine needs of driver and device.
    `graph` and `profiles` are SHA-256 digests: `graph_digest` and `profile_digest`.
    """

    family: str
    version: str
    sms: tuple[int, ...]
    machine: str
    options: Mapping[str, str]
    graph: str
    profiles: str

    @property
    def target(self) -> str:
        """The name of the folder for all engines of one device and TensorRT."""
        return f"{self.family}-{self.version}-sm{'-'.join(map(str, self.sms))}-{self.machine}"

    @property
    def digest(self) -> str:
        """SHA-256 over the whole key."""
        return canonical_sha256(dataclasses.asdict(self), without="")

    def folder(self, graph: str, variant: str) -> str:
        """Path of an engine of this key below engines/."""
        return f"{self.target}/{graph}.{variant}.{self.digest[:12]}"


@dataclass(frozen=True)
class EngineEntry:
    """What engine.json says of an engine.

    `profiles` are in the order of TensorRT's profile indices; `capacity` is S of a cache updated in place, which
    is fixed in the engine. `inputs` and `outputs` are the manifest's, KV buffers included. `size` and `sha256` are the
    plan's; `built` tells how it came to be, for people: when, seconds, peak memory, what the plan holds.
    """

    key: EngineKey
    target: str
    graph: str
    variant: str
    precision: str
    profiles: Profiles
    capacity: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    size: int
    sha256: str
    built: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    folder: str = ""
    """Where it was found; filled in on reading."""

    @property
    def plan(self) -> Path:
        """Path of the serialized engine."""
        return Path(self.folder) / PLAN

    def profile_for(self, sizes: Mapping[str, int]) -> str | None:
        """Return the first profile that holds these sizes (symbol → size), None if there is none.

        A size below a profile's least one does not fit it: frames are padded up to it (through `frame_mask`) first.
        """
        for name, ranges in self.profiles.items():
            if all(ranges[s][0] <= size <= ranges[s][2] for s, size in sizes.items() if s in ranges):
                return name
        return None

    def check_plan(self) -> None:
        """Check the size of the serialized engine and, up to 64 MiB, its hash.

        Raises:
            EngineError: it was changed, or cannot be read.
        """
        try:
            size = self.plan.stat().st_size
            if size != self.size or (size <= HASHED_BYTES_ON_LOAD and file_sha256(self.plan) != self.sha256):
                raise EngineError(f"{self.plan}: was changed after it was built. Build the engine again.")
        except OSError as error:
            raise EngineError(f"{self.plan}: cannot be read ({error}). Build the engine again.") from error

    def read_plan(self) -> bytes:
        """Return the serialized engine. Raises as `check_plan`, which comes first."""
        self.check_plan()
        try:
            return self.plan.read_bytes()
        except OSError as error:
            raise EngineError(f"{self.plan}: cannot be read ({error}). Build the engine again.") from error


def graph_digest(graph: GraphSpec) -> str:
    """Hash a graph's structure and weights: what the manifest says of its .onnx file and its data files."""
    files = {"graph": graph.sha256, **{entry.path: entry.sha256 for entry in graph.data}}
    return canonical_sha256(files, without="")


def profile_digest(profiles: Profiles, capacity: int | None) -> str:
    """Hash profiles, their order and the cache's capacity."""
    ordered = [[name, {symbol: list(sizes) for symbol, sizes in ranges.items()}] for name, ranges in profiles.items()]
    return canonical_sha256({"profiles": ordered, "capacity": capacity}, without="")


def engine_folders(bundle: Bundle) -> tuple[Path, Path]:
    """Return where a bundle's engines may lie: in the bundle, and in the user's cache, by the bundle's fingerprint."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = bundle.manifest.fingerprint[:16] or bundle.path.name
    return bundle.path / ENGINES, Path(base) / "bridge-stg" / ENGINES / name


def read_engines(bundle: Bundle, graph: GraphSpec | None = None) -> list[EngineEntry]:
    """Return the engines of a bundle, or of one graph variant: the bundle's own before those of the user's cache.

    Raises:
        EngineError: an engine.json cannot be understood.
    """
    return [_read(file) for file in _files(bundle, graph)]


def _files(bundle: Bundle, graph: GraphSpec | None) -> list[Path]:
    name = "*" if graph is None else f"{graph.name}.{graph.variant}.*"
    return [file for folder in engine_folders(bundle) for file in sorted(folder.glob(f"*/{name}/{ABOUT}"))]


def _whole_and_damaged(bundle: Bundle, graph: GraphSpec) -> tuple[list[EngineEntry], list[EngineError]]:
    built, damaged = [], []
    for file in _files(bundle, graph):
        try:
            built.append(_read(file))
        except EngineError as error:
            damaged.append(error)
    return built, damaged


def read_engine(bundle: Bundle, graph: GraphSpec, key: EngineKey) -> EngineEntry | None:
    """Return the engine of one graph variant that has this key, None if there is none.

    Raises:
        EngineError: it is damaged.
    """
    damage: EngineError | None = None
    for folder in engine_folders(bundle):
        file = folder / key.folder(graph.name, graph.variant) / ABOUT
        try:
            if file.is_file():
                entry = _read(file)
                entry.check_plan()
                return entry
        except EngineError as error:
            damage = damage or error
    if damage is not None:
        raise damage
    return None


def find_engine(bundle: Bundle, graph: GraphSpec, device: EngineDevice) -> EngineEntry:
    """Return the engine of one graph variant that fits a device; of several, the one that was built last.

    Raises:
        EngineError: there is none. The message says how the closest one differs, and the command that builds it.
    """
    built, damaged = _whole_and_damaged(bundle, graph)
    fitting = [e for e in built if next(_differences(e.key, graph, device), None) is None]
    if fitting:
        return max(fitting, key=lambda e: str(e.built.get("finished", "")))
    build = f"python cli.py build {bundle.path} --target this --graph {graph.name} --variant {graph.variant}"
    if damaged:
        raise EngineError(f"{damaged[0]} The command: {build}")
    if not built:
        raise EngineError(f"{bundle.path}: no engine of {graph} has been built for {device}. Build it: {build}")
    closest = min(built, key=lambda e: len(list(_differences(e.key, graph, device))))
    why = " and ".join(_differences(closest.key, graph, device))
    raise EngineError(f"{closest.folder}: this engine of {graph} {why}. It cannot be used; build it again: {build}")


def _differences(key: EngineKey, graph: GraphSpec, device: EngineDevice) -> Iterator[str]:
    """Yield in words why an engine does not fit, in the order in which a person wants to know it."""
    family, wanted = FAMILIES.get(key.family, key.family), FAMILIES.get(device.family, device.family)
    if (key.family, key.version) != (device.family, device.version):
        yield f"was built with {family} {key.version}, and {wanted} {device.version} is installed"
    if device.sm not in key.sms:
        yield f"was built for SM {', '.join(map(str, key.sms))}, and this GPU is SM {device.sm}"
    if key.machine != device.machine:
        yield f"was built for {key.machine}, and this machine is {device.machine}"
    if key.graph != graph_digest(graph):
        yield "was built from another version of the graph"


def _read(file: Path) -> EngineEntry:
    again = "Build the engine again."
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
            found = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
            raise EngineError(f"{file}: schema version {found!r}, and this program reads {SCHEMA_VERSION}. {again}")
        if values.pop("about_sha256", None) != canonical_sha256(values, without=""):
            raise EngineError(f"{file}: was changed after the engine was built. {again}")
        entry: EngineEntry = from_json(EngineEntry, values, "")
    except (OSError, ValueError) as error:
        raise EngineError(f"{file}: cannot be read ({error}). {again}") from error
    return dataclasses.replace(entry, folder=str(file.parent))
