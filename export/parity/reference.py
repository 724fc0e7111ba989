"""Record the torch reference of an export: probes of every graph, and the golden cases of the bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bridge_stg.export.parity.probes import PROBE_SIZES, Probe, feeds_of, run
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession


def probe_graph(name: str, model: BridgeSTG, *, seed: int = 0) -> Iterator[Probe]:
    """Yield one probe a size of one graph.

    Args:
        name: of the graph.
        model: the reference, in eval mode, with its weights.
        seed: of the random inputs.
    """
    reference = TorchSession(name, model)
    for index, sizes in enumerate(PROBE_SIZES[name]):
        feeds, past = feeds_of(name, model.spec, sizes, np.random.default_rng([seed, index]))
        expected = run(reference, feeds, past)
        dependence = {}
        if index == 1:
            others, _ = feeds_of(name, model.spec, sizes, np.random.default_rng([seed + 1, index]))
            moved = run(reference, others, past)
            dependence = {f"{name}.{k}": _moved(expected[k], moved[k]) for k in expected}
        yield Probe(name, sizes, feeds, past, expected, dependence)


def record_probes(name: str, model: BridgeSTG, folder: Path) -> None:
    """Write the probes of one graph where `probes.load_probes` finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, probe in enumerate(probe_graph(name, model)):
        probe.save(folder / f"{name}_{index}.npz")


def _moved(reference: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(reference - other) / max(float(np.linalg.norm(reference)), 1e-12))
