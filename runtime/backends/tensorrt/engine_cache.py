"""Find the TensorRT engine of a graph for a device: keys, metadata and folders of engines.

An engine is a folder `<target key>/<graph>.<variant>.<digest>/` with `engine.plan` and `engine.json`, in the bundle's
engines/, or in the user's cache if the bundle is read-only. engine.json alone decides whether it fits, before TensorRT
reads the plan. Knows nothing of TensorRT.
"""

from __future__ import annotations

import dataclasses
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
from bridge_stg.runtime.host.parse import parse_json_file

PLAN, ABOUT = "engine.plan", "engine.json"
SCHEMA_VERSION = 1
FAMILIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""Engines of one family do not load in the other."""

Profiles = Mapping[str, Mapping[str, tuple[int, int, int]]]
"""Least, usual and largest size of each symbol by profile name, in the order of the engine's profile indices."""


def machine_name() -> str:
    """Return the operating system and processor that a plan is bound to, such as `linux-aarch64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


@dataclass(frozen=True)
class EngineDevice:
    """Device and TensorRT that an engine must fit.

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
    """Everything that an engine depends on. Two engines with equal keys are interchangeable.

    `sms` are the compute capabilities that it runs on: one if it was built on the device, the target's list if it was
    built ahead of time. `options` are builder settings that change the requirements on driver and device.
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
    """The content of an engine's engine.json.

    `profiles` are in the order of TensorRT's profile indices; `capacity` is S of a cache updated in place, which is
    fixed in the engine. `inputs` and `outputs` are the manifest's, with KV buffers. `size` and `sha256` are the plan's;
    `built` is informative: date, seconds, peak memory, fused layers.
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
    """The engine's folder; set on reading."""

    @property
    def plan(self) -> Path:
        """Path of the serialized engine."""
        return Path(self.folder) / PLAN

    def check_plan(self) -> None:
        """Check the plan's size and, up to 64 MiB, its hash. Raises EngineError: it was changed or cannot be read."""
        try:
            size = self.plan.stat().st_size
            if size != self.size or (size <= HASHED_BYTES_ON_LOAD and file_sha256(self.plan) != self.sha256):
                raise _damaged(self.plan, "was changed after it was built")
        except OSError as error:
            raise _damaged(self.plan, f"cannot be read ({error})") from error

    def read_plan(self) -> bytes:
        """Check the serialized engine with `check_plan` and return it. Raises EngineError if it is damaged."""
        self.check_plan()
        try:
            return self.plan.read_bytes()
        except OSError as error:
            raise _damaged(self.plan, f"cannot be read ({error})") from error


def _damaged(file: Path, what: str) -> EngineError:
    return EngineError("engine.damaged", f"{file}: {what}. Build the engine again.")


def graph_digest(graph: GraphSpec) -> str:
    """Hash a graph's structure and weights, from the manifest's hashes of its .onnx file and data files."""
    files = {"graph": graph.sha256, **{entry.path: entry.sha256 for entry in graph.data}}
    return canonical_sha256(files, without="")


def profile_digest(profiles: Profiles, capacity: int | None) -> str:
    """Hash profiles, their order and the cache's capacity."""
    ordered = [[name, {symbol: list(sizes) for symbol, sizes in ranges.items()}] for name, ranges in profiles.items()]
    return canonical_sha256({"profiles": ordered, "capacity": capacity}, without="")


def engine_folders(bundle: Bundle) -> tuple[Path, Path]:
    """Return the engine folders of a bundle: in the bundle, and in the user's cache, by the bundle's fingerprint."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = bundle.manifest.fingerprint[:16] or bundle.path.name
    return bundle.path / ENGINES, Path(base) / "bridge-stg" / ENGINES / name


def read_engines(bundle: Bundle, graph: GraphSpec | None = None) -> list[EngineEntry]:
    """Return the engines of a bundle, or of one graph variant: first the bundle's, then those of the user's cache.

    Raises:
        EngineError: an engine.json is damaged.
    """
    return [_read(file) for file in _files(bundle, graph)]


def _files(bundle: Bundle, graph: GraphSpec | None) -> list[Path]:
    name = "*" if graph is None else f"{graph.name}.{graph.variant}.*"
    return [file for folder in engine_folders(bundle) for file in sorted(folder.glob(f"*/{name}/{ABOUT}"))]


def read_engine(bundle: Bundle, graph: GraphSpec, key: EngineKey) -> EngineEntry | None:
    """Return the engine of one graph variant that has this key; None if it does not exist.

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
    """Return the last built engine of one graph variant that fits a device.

    Raises:
        EngineError: no engine fits. The message has the differences of the closest one, and the command to build it.
    """
    built, damaged = [], []
    for file in _files(bundle, graph):
        try:
            built.append(_read(file))
        except EngineError as error:
            damaged.append(error)
    fitting = [e for e in built if next(_differences(e.key, graph, device), None) is None]
    if fitting:
        return max(fitting, key=lambda e: str(e.built.get("finished", "")))
    build = f"python cli.py build {bundle.path} --target this --graph {graph.name} --variant {graph.variant}"
    if damaged:
        raise EngineError("engine.damaged", f"{damaged[0]} The command: {build}")
    if not built:
        raise EngineError(
            "engine.not_built", f"{bundle.path}: no engine of {graph} is built for {device}. Build: {build}"
        )
    closest = min(built, key=lambda e: len(list(_differences(e.key, graph, device))))
    why = " and ".join(_differences(closest.key, graph, device))
    raise EngineError("engine.not_built", f"{closest.folder}: this engine of {graph} {why}. Build it again: {build}")


def _differences(key: EngineKey, graph: GraphSpec, device: EngineDevice) -> Iterator[str]:
    """Yield the reasons why an engine does not fit, most important first."""
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
    try:
        values = parse_json_file(file)
        if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
            found = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
            raise _damaged(file, f"schema version {found!r}, and this program reads {SCHEMA_VERSION}")
        if values.pop("about_sha256", None) != canonical_sha256(values, without=""):
            raise _damaged(file, "was changed after the engine was built")
        entry: EngineEntry = from_json(EngineEntry, values, "")
    except (OSError, ValueError) as error:
        raise _damaged(file, f"cannot be read ({error})") from error
    return dataclasses.replace(entry, folder=str(file.parent))
