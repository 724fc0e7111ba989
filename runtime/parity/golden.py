"""Golden cases: the torch reference's inputs and outputs at every boundary of one small run, as files.

`golden/<case>/case.json` tells what the case shows and how near an engine must come; `golden/<case>/<graph>_<i>.npz`
is call i of a graph, with arrays `in.<input>` and `out.<output>`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import BundleError

_CALL_NAME = re.compile(r"(?P<graph>\w+)_(?P<index>\d+)\.npz")
_AGAIN = "Copy the bundle again from its source, or export it again."


@dataclass(frozen=True)
class Tolerance:
    """How far a tensor may be from its reference: `max_abs` per unit of max(1, the reference's largest magnitude).

    `least_iou` is what every box must reach with the reference's, where a tensor holds boxes.
    """

    max_abs: float
    rel_l2: float
    least_iou: float = 0.0


@dataclass(frozen=True)
class GoldenCall:
    """One recorded call of a graph."""

    graph: str
    index: int
    path: Path

    @property
    def name(self) -> str:
        return f"{self.graph}_{self.index}"

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return (inputs, outputs) by tensor name.

        Raises:
            BundleError: the file is no .npz of plain arrays, or an array's name has neither prefix.
        """
        inputs: dict[str, np.ndarray] = {}
        outputs: dict[str, np.ndarray] = {}
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                for key in arrays.files:
                    prefix, _, name = key.partition(".")
                    if prefix not in ("in", "out") or not name:
                        raise ValueError(f"array {key!r} begins with neither 'in.' nor 'out.'")
                    (inputs if prefix == "in" else outputs)[name] = arrays[key]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{self.path}: this recorded call cannot be read ({error}). {_AGAIN}") from error
        return inputs, outputs


@dataclass(frozen=True)
class GoldenCase:
    """One recorded run. `tolerance` is keyed by `graph.tensor` or by `tensor` alone; other tensors get the defaults.

    `cache_capacity` is the size of the KV cache in which calls without recorded past_* are replayed one after another.
    """

    name: str
    kind: str
    note: str
    calls: tuple[GoldenCall, ...]
    tolerance: Mapping[str, Tolerance] = field(default_factory=dict)
    cache_capacity: int | None = None

    def tolerance_of(self, graph: str, tensor: str) -> Tolerance | None:
        """Return the case's own tolerance of a tensor, if it has one."""
        return self.tolerance.get(f"{graph}.{tensor}", self.tolerance.get(tensor))


@dataclass(frozen=True)
class _CaseFile:
    kind: str
    note: str = ""
    tolerance: Mapping[str, Tolerance] = field(default_factory=dict)
    cache_capacity: int | None = None


def read_case(folder: Path) -> GoldenCase:
    """Read a case's folder; its arrays are loaded call by call later.

    Raises:
        BundleError: case.json is missing or wrong.
    """
    file = folder / "case.json"
    try:
        about: _CaseFile = from_json(_CaseFile, json.loads(file.read_text(encoding="utf-8")), "case")
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: this golden case cannot be read ({error}). {_AGAIN}") from error
    matches = [(match, path) for path in folder.glob("*.npz") if (match := _CALL_NAME.fullmatch(path.name))]
    calls = [GoldenCall(match["graph"], int(match["index"]), path) for match, path in matches]
    calls.sort(key=lambda call: (call.graph, call.index))
    return GoldenCase(folder.name, about.kind, about.note, tuple(calls), about.tolerance, about.cache_capacity)


def write_case(
    folder: Path,
    calls: Sequence[tuple[str, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
    *,
    kind: str,
    note: str = "",
    tolerance: Mapping[str, Tolerance] | None = None,
    cache_capacity: int | None = None,
) -> None:
    """Write a case into golden/<case> of a bundle that is being written.

    Args:
        calls: (graph, inputs, outputs) in the order in which they were made; numbered by graph from 0.
        cache_capacity: needed if the calls of a graph with a KV cache leave out their past_*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = _CaseFile(kind, note, tolerance or {}, cache_capacity)
    (folder / "case.json").write_text(json.dumps(asdict(about), indent=1) + "\n", encoding="utf-8")
    made: dict[str, int] = {}
    for graph, inputs, outputs in calls:
        index = made[graph] = made.get(graph, -1) + 1
        arrays: dict[str, Any] = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in outputs.items()}
        with open(folder / f"{graph}_{index}.npz", "wb") as file:
            np.savez_compressed(file, **arrays)
