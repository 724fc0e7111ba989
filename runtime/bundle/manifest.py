"""The content of a bundle's manifest.json, as frozen dataclasses that reject contradictions with a ValueError.

Knows nothing of folders: `bundle` checks that the listed files exist and are unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

from bridge_stg.runtime.bundle.spec import Count, HeadDim, ModelSpec
from bridge_stg.runtime.bundle.typed_json import Between, from_json

SCHEMA_VERSION = 2
"""Version that is written. It and the one before are read; docs/releases.md says when it is raised."""

DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
CACHE_UPDATES = ("in_place", "append")

Bytes: TypeAlias = Annotated[int, Between(0, 2**60)]
Size: TypeAlias = Annotated[int, Between(0, 2**40)]  # of one dim of a tensor


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: its POSIX path below the bundle's folder, bytes and SHA-256 (hex)."""

    path: str
    size: Bytes
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. A dim is a number, a symbol such as `B`, or (outputs only) an expression."""

    name: str
    dtype: str
    dims: tuple[Size | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor {self.name!r} has dtype {self.dtype!r}; known dtypes: {', '.join(DTYPES)}")

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class CacheSpec:
    """How a graph keeps its KV cache: two buffers per layer, each [B, kv_heads, S, head_dim].

    `update` is `in_place` (the graph returns present_*, which share the buffers of past_*) or `append` (past_* are
    only read, the graph returns new_* [B, kv_heads, L, head_dim], and the session writes those rows).
    """

    update: str
    layers: Count
    kv_heads: Count
    head_dim: HeadDim
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.update not in CACHE_UPDATES:
            raise ValueError(f"the cache's update is {self.update!r}; known: {', '.join(CACHE_UPDATES)}")

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of the cache inputs: past_key_0, past_value_0, past_key_1 and so on."""
        return self._names("past")

    @property
    def written_names(self) -> tuple[str, ...]:
        """Names of the outputs for `past_names`, in the same order: present_* (`in_place`) or new_* (`append`)."""
        return self._names("present" if self.update == "in_place" else "new")

    def _names(self, prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}_{part}_{i}" for i in range(self.layers) for part in ("key", "value"))


@dataclass(frozen=True)
class GraphSpec:
    """One variant of one graph: its inputs, outputs and files.

    `ranges` maps a symbol to (least, largest or None); `derived_from` names the variant that a pass or quantization
    started from. The bundle's writer fills in `file`, `size`, `sha256` and `data` (external data files).
    """

    name: str
    variant: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: Count
    precision: str = "fp32"
    ranges: Mapping[str, tuple[Size, Size | None]] = field(default_factory=dict)
    cache: CacheSpec | None = None
    derived_from: str | None = None
    file: str = ""
    size: Bytes = 0
    sha256: str = ""
    data: tuple[FileEntry, ...] = ()

    def __post_init__(self) -> None:
        if self.cache is None:
            return
        cache, tensors = self.cache, {t.name: t for t in self.inputs + self.outputs}
        for name in ("cache_position", *cache.past_names, *cache.written_names):
            if name not in tensors:
                raise ValueError(f"the cache contract {cache.update!r} needs a tensor {name!r}")
        for tensor in map(tensors.__getitem__, cache.past_names):
            found = (len(tensor.dims), *tensor.dims[1::2], tensor.dtype)
            if found != (4, cache.kv_heads, cache.head_dim, cache.dtype):
                raise ValueError(f"{tensor} must be {cache.dtype} [B, {cache.kv_heads}, S, {cache.head_dim}]")

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})"

    @property
    def made_by_pass(self) -> bool:
        """Whether a graph pass made it from another variant of its bundle, and so may have fused named nodes."""
        return self.derived_from not in (None, self.variant)


@dataclass(frozen=True)
class Manifest:
    """The whole manifest.

    `graphs` maps name → variant → GraphSpec; `files` lists all other files under the fingerprint (tokenizer, golden
    cases). `model` and `tools` are free-form (name, parameters; package → version), `calibration` describes the samples
    that quantized the graphs (None: not quantized), `verified` says whether parity with the torch reference was
    measured and passed. `io_dtype` is the dtype of visual_tokens, feature_map and taps, `made_by` the version of
    bridge-stg that wrote the bundle, and `schema_version` that of its file, even if it was migrated while it was read.
    """

    spec: ModelSpec
    model: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, Any] = field(default_factory=dict)
    graphs: Mapping[str, Mapping[str, GraphSpec]] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    io_dtype: str = "float32"
    calibration: Mapping[str, Any] | None = None
    verified: bool = False
    made_by: str = ""
    schema_version: int = SCHEMA_VERSION
    fingerprint: str = ""

    @classmethod
    def from_dict(cls, values: Any) -> Manifest:
        """Build a manifest from JSON values. Raises ValueError, naming the field, if one is wrong or missing."""
        manifest = from_json(cls, values)
        for name, variants in manifest.graphs.items():
            for variant, graph in variants.items():
                if (graph.name, graph.variant) != (name, variant):
                    raise ValueError(f"graphs.{name}.{variant} has name and variant {graph}")
        return manifest

    def entries(self) -> dict[str, FileEntry]:
        """Return every file under the fingerprint, by path. Raises ValueError if two entries of a path differ."""
        found: dict[str, FileEntry] = {}
        of_graphs = [e for g in self.all_graphs() for e in (FileEntry(g.file, g.size, g.sha256), *g.data)]
        for entry in (*of_graphs, *self.files):
            if found.setdefault(entry.path, entry) != entry:
                raise ValueError(f"{entry.path} is listed twice, with different sizes or hashes")
        return found

    def all_graphs(self) -> list[GraphSpec]:
        """Return every variant of every graph."""
        return [graph for variants in self.graphs.values() for graph in variants.values()]


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a manifest of the schema before this one with the fields of this one.

    Values of this schema are returned as they are. `schema_version` stays that of the file.
    """
    if values["schema_version"] == SCHEMA_VERSION - 1:
        return {**values, "made_by": "0.1.0"}  # which wrote all bundles of schema 1; fields that it lacks have defaults
    return values


def canonical_sha256(values: Mapping[str, Any], *, without: str) -> str:
    """Return the SHA-256 of JSON values, independent of key order and layout, leaving out the key for the hash."""
    rest = {key: value for key, value in values.items() if key != without}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
