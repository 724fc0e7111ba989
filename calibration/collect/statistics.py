"""Activation statistics of a bundle on disk, with one file of sampled rows per tensor.

Tensors are found by the nodes of the matmuls that read them, which are equal in all variants of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.bundle import read_manifest
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.parse import parse_json
from bridge_stg.runtime.parity.golden import READ_ERRORS

SCHEMA = 1
FILE = "statistics.json"
FIELDS = ("fingerprint", "variants", "asked", "tensors")
"""Fields of this file that are read; the others identify the collection."""


@dataclass(frozen=True)
class Collected:
    """Statistics of one tensor; files are named relative to the folder.

    Attributes:
        rows: file of float32 [R, K]: random rows of all calls, and the rows with the largest magnitude of each sample.
        absmax: file of float32 [K]: largest magnitude of each channel over all calls.
        seen: number of rows of all calls.
    """

    rows: str
    absmax: str
    seen: int


@dataclass(frozen=True)
class _Content:
    """`FIELDS` of statistics.json."""

    fingerprint: str
    variants: Mapping[str, str]
    asked: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Mapping[str, Collected]]


@dataclass(frozen=True)
class Statistics:
    """The activation statistics of a bundle, from `collect.collect` or `Statistics.load`.

    Attributes:
        folder: folder of the files.
        bundle: folder of the bundle.
        variants: graph → variant that ran.
        samples: `id`, `answer` and `span` of each sample in order, or `skipped` with the reason.
        tensors: graph → node of a matmul, or past_key_0 … for keys and values → its statistics.
    """

    folder: Path
    bundle: Path
    variants: Mapping[str, str]
    samples: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Collected]]

    @classmethod
    def load(cls, folder: Path, bundle: Path) -> Statistics:
        """Read the finished statistics in a folder. Raises BridgeError if they are missing or of another bundle."""
        file = folder / FILE
        advice = f"Delete the folder {folder}, and collect them again"
        try:
            values = parse_json(file.read_bytes(), finite=False)
        except FileNotFoundError:
            raise _error(f"{folder}: {FILE} is missing; expected the folder of a finished collection.") from None
        except ValueError as error:
            raise _error(f"{file}: cannot be read as JSON ({error}). {advice}.") from None
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise _error(f"{file}: has schema {found!r}, expected {SCHEMA}. {advice}.")
        fingerprint = read_manifest(bundle).fingerprint
        try:
            content = from_json(_Content, {name: values.get(name) for name in FIELDS}, "statistics")
        except ValueError as error:
            raise _error(f"{file}: {error}. {advice}.") from None
        if content.fingerprint != fingerprint:
            found = f"{content.fingerprint[:12]}…, but {bundle} is {fingerprint[:12]}…"
            raise _error(f"{folder}: has statistics of the bundle {found}. {advice}.")
        return cls(folder, bundle, content.variants, content.asked, content.tensors)

    @property
    def warnings(self) -> list[str]:
        """Warnings about samples that failed, and about graphs that no sample reached."""
        skipped = [sample for sample in self.samples if "skipped" in sample]
        found = []
        if skipped:
            first = f"the first is {skipped[0]['id']!r}: {skipped[0]['skipped']}"
            found.append(f"{len(skipped)} of {len(self.samples)} calibration samples could not be used; {first}")
        unseen = [graph for graph, tensors in self.tensors.items() if not any(t.seen for t in tensors.values())]
        return found + [f"no calibration sample reached the {graph}: it has no statistics" for graph in unseen]

    def rows(self, graph: str, name: str) -> np.ndarray:
        """Return sampled rows float32 [R, K] of a tensor, mapped from disk."""
        tensor = self._of(graph, name)
        rows = _load(self.folder / tensor.rows, dimensions=2, mapped=tensor.seen > 0)  # an empty file cannot be mapped
        if rows.shape[1] != len(self.absmax(graph, name)):
            raise _error(
                f"{self.folder / tensor.rows}: has {rows.shape[1]} channels, and {tensor.absmax} another number."
            )
        return rows

    def absmax(self, graph: str, name: str) -> np.ndarray:
        """Return the largest magnitude of each channel of a tensor, float32 [K]."""
        return _load(self.folder / self._of(graph, name).absmax, dimensions=1)

    def caches(self, graph: str) -> list[str]:
        """Return the names of the keys and values of a graph, past_key_0 …; their channels are ordered by head."""
        return [name for name in self.tensors.get(graph, {}) if name.startswith("past_")]

    def _of(self, graph: str, name: str) -> Collected:
        try:
            return self.tensors[graph][name]
        except KeyError:
            what = f"has no statistics of {name!r} of the {graph}; collect them again with this bundle"
            raise _error(f"{self.folder}: {what}.") from None


def _load(file: Path, *, dimensions: int, mapped: bool = False) -> np.ndarray:
    """Return the float32 array of a file. Raises BridgeError if it is missing, damaged or of another kind."""
    try:
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != dimensions:
            raise ValueError(f"expected an array float32 of {dimensions} dimensions")
    except READ_ERRORS as error:
        what = (
            f"{file}: is damaged or missing ({error}). Delete the folder of these statistics, and collect them again."
        )
        raise _error(what) from error
    return array


def _error(message: str) -> BridgeError:
    return BridgeError("calibration.bad_statistics", message)
