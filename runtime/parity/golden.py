"""Golden cases: the torch reference's inputs and outputs at every boundary of one small run, as files.

`golden/<case>/case.json` describes the case and its tolerances; `golden/<case>/<graph>_<i>.npz` is call i of a graph,
with arrays `in.<input>` and `out.<output>`.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np

from bridge_stg.runtime.bundle.bundle import COPY_AGAIN
from bridge_stg.runtime.bundle.typed_json import Between, from_json
from bridge_stg.runtime.errors import BundleError
from bridge_stg.runtime.host.parse import parse_json_file

Difference: TypeAlias = Annotated[float, Between(0, 10**9)]


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed difference of a tensor from its reference.

    `max_abs` counts per unit of max(1, the reference's largest magnitude); `least_iou` applies to tensors of boxes.
    """

    max_abs: Difference
    rel_l2: Difference
    least_iou: Annotated[float, Between(0, 1)] = 0.0


READ_ERRORS = (OSError, ValueError, EOFError, KeyError, MemoryError, NotImplementedError, RuntimeError, zlib.error,
               zipfile.BadZipFile)  # fmt: skip
"""Exceptions of numpy and zipfile for a file that is not an archive of arrays."""


@dataclass(frozen=True)
class GoldenCall:
    """One recorded call of a graph."""

    graph: str
    index: int
    path: Path

    @property
    def name(self) -> str:
        """The call's file name without suffix."""
        return f"{self.graph}_{self.index}"

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return (inputs, outputs) by tensor name. Raises BundleError if the file is not one of recorded arrays."""
        found: dict[str, dict[str, np.ndarray]] = {"in": {}, "out": {}}
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                for key in arrays.files:
                    prefix, _, name = key.partition(".")
                    if prefix not in found or not name:
                        raise ValueError(f"array {key!r} begins with neither 'in.' nor 'out.'")
                    found[prefix][name] = arrays[key]
        except READ_ERRORS as error:
            raise BundleError("bundle.bad_golden_case", f"{self.path}: {error}. {COPY_AGAIN}") from error
        return found["in"], found["out"]


@dataclass(frozen=True)
class GoldenCase:
    """One recorded run."""

    name: str
    about: CaseFile
    calls: tuple[GoldenCall, ...]

    def tolerance_of(self, graph: str, tensor: str) -> Tolerance | None:
        """Return the case's own tolerance of a tensor, if it has one."""
        own = self.about.tolerance
        return own.get(f"{graph}.{tensor}", own.get(tensor))


@dataclass(frozen=True)
class CaseFile:
    """Content of case.json.

    `tolerance` is keyed by `graph.tensor` or by `tensor` alone; other tensors get the defaults. `cache_capacity` is the
    capacity of the KV cache with which calls without recorded past_* are replayed in order.
    """

    kind: str
    note: str = ""
    tolerance: Mapping[str, Tolerance] = field(default_factory=dict)
    cache_capacity: Annotated[int, Between(1, 2**18)] | None = None


def read_case(folder: Path) -> GoldenCase:
    """Read case.json and the list of calls. Raises BundleError if case.json is missing or wrong."""
    file = folder / "case.json"
    try:
        about = from_json(CaseFile, parse_json_file(file), "case")
    except (OSError, ValueError) as error:
        raise BundleError("bundle.bad_golden_case", f"{file}: cannot be read ({error}). {COPY_AGAIN}") from error
    names = [(*path.stem.rpartition("_")[::2], path) for path in folder.glob("*.npz")]
    calls = sorted((graph, int(index), path) for graph, index, path in names if graph and index.isdecimal())
    return GoldenCase(folder.name, about, tuple(GoldenCall(*call) for call in calls))


def write_case(
    folder: Path,
    calls: Sequence[tuple[str, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
    *,
    kind: str,
    note: str = "",
    tolerance: Mapping[str, Tolerance] | None = None,
    cache_capacity: int | None = None,
) -> None:
    """Write a case, usually into golden/<case> of a bundle that is being written.

    `calls` are (graph, inputs, outputs) in call order, numbered per graph from 0. For the other arguments see
    `CaseFile`; `cache_capacity` is required if calls of a graph with a KV cache have no past_*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = CaseFile(kind, note, tolerance or {}, cache_capacity)
    (folder / "case.json").write_text(json.dumps(asdict(about), indent=1) + "\n", encoding="utf-8")
    made: dict[str, int] = {}
    for graph, inputs, outputs in calls:
        index = made[graph] = made.get(graph, -1) + 1
        arrays: dict[str, Any] = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in outputs.items()}
        with open(folder / f"{graph}_{index}.npz", "wb") as file:
            np.savez_compressed(file, **arrays)
