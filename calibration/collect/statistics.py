"""What was collected of a bundle's activations, as it lies on disk: one file of sampled rows a tensor.

Graphs' tensors are found by the names of the products that read them, which all variants of a graph share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.bundle import read_manifest
from bridge_stg.runtime.errors import BridgeError

SCHEMA = 1
FILE = "statistics.json"


@dataclass(frozen=True)
class Collected:
    """What is known of one tensor.

    Attributes:
        rows: file of float32 [R, K] below the folder: rows drawn from all calls, and the largest of each sample.
        absmax: file of float32 [K]: the largest magnitude of each channel in everything that flowed.
        seen: rows that flowed in all.
    """

    rows: str
    absmax: str
    seen: int


@dataclass(frozen=True)
class Statistics:
    """The statistics of a bundle. Get them from `collect.collect`, or read them again with `Statistics.load`.

    Attributes:
        folder: where they lie.
        bundle: the folder of the bundle that they are of.
        fingerprint: of that bundle.
        variants: graph → the variant that ran.
        seed: of the choice of rows.
        samples: what flowed: `id`, `answer`, `span` of each in their order, or `skipped` with the reason.
        tensors: graph → node of a product, or past_key_0 … for keys and values → what was collected.
    """

    folder: Path
    bundle: Path
    fingerprint: str
    variants: Mapping[str, str]
    seed: int
    samples: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Collected]]

    @classmethod
    def load(cls, folder: Path, bundle: Path) -> Statistics:
        """Read the statistics in a folder.

        Args:
            folder: where a collection was finished.
            bundle: the bundle that they were collected of, wherever it lies now.

        Raises:
            BridgeError: there are none, none that this program can read, or those of another bundle.
        """
        file = folder / FILE
        advice = "Collect them again, into another folder"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BridgeError(f"{folder}: holds no {FILE}; expected the folder of a finished collection.") from None
        except ValueError as error:
            raise BridgeError(f"{file}: cannot be read as JSON ({error}). {advice}.") from None
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise BridgeError(f"{file}: has schema {found!r}, expected {SCHEMA}. {advice}.")
        fingerprint = read_manifest(bundle).fingerprint
        if values["fingerprint"] != fingerprint:
            raise BridgeError(
                f"{folder}: holds statistics of the bundle {values['fingerprint'][:12]}…, but {bundle} is "
                f"{fingerprint[:12]}…. {advice}."
            )
        return cls(
            folder=folder,
            bundle=bundle,
            fingerprint=values["fingerprint"],
            variants=values["variants"],
            seed=values["seed"],
            samples=values["asked"],
            tensors={
                graph: {name: Collected(**tensor) for name, tensor in tensors.items()}
                for graph, tensors in values["tensors"].items()
            },
        )

    @property
    def warnings(self) -> list[str]:
        """What a person should know about the samples that flowed, as sentences."""
        skipped = [sample for sample in self.samples if "skipped" in sample]
        found = []
        if skipped:
            first = f"the first is {skipped[0]['id']!r}: {skipped[0]['skipped']}"
            found.append(f"{len(skipped)} of {len(self.samples)} calibration samples could not be used; {first}")
        silent = [graph for graph, tensors in self.tensors.items() if not any(t.seen for t in tensors.values())]
        found += [
            f"no calibration sample reached the {graph}, so nothing is known of its activations" for graph in silent
        ]
        return found

    def rows(self, graph: str, name: str) -> np.ndarray:
        """Return sampled rows float32 [R, K] of a tensor, read from disk as they are used."""
        tensor = self._of(graph, name)
        # An empty file cannot be mapped.
        rows: np.ndarray = np.load(self.folder / tensor.rows, mmap_mode="r" if tensor.seen else None)
        return rows

    def absmax(self, graph: str, name: str) -> np.ndarray:
        """Return the largest magnitude of each channel of a tensor, float32 [K]."""
        absmax: np.ndarray = np.load(self.folder / self._of(graph, name).absmax)
        return absmax

    def caches(self, graph: str) -> list[str]:
        """Return the names of the keys and values of a graph: past_key_0, past_value_0 …; channels are head by head."""
        return [name for name in self.tensors.get(graph, {}) if name.startswith("past_")]

    def _of(self, graph: str, name: str) -> Collected:
        try:
            return self.tensors[graph][name]
        except KeyError:
            raise BridgeError(
                f"{self.folder}: nothing was collected of {name!r} of the {graph}; these are of another model. "
                "Collect them again from this bundle."
            ) from None
