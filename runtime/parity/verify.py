"""Verify a bundle on this machine: hash every file, then replay the golden cases with every variant that runs here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.bundle import bundle as bundles
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.errors import BundleError, EngineError
from bridge_stg.runtime.parity.compare import Boundary, format_table, replay


class DriftError(BundleError):
    """Outputs of golden cases that differ from the recorded ones by more than their tolerance.

    Attributes:
        bundle: the bundle, whose files are whole.
        replayed: every boundary that was compared, by variant.
        variant: of the first output that drifts, in the chain's order.
        boundary: this output.
    """

    bundle: Bundle
    replayed: dict[str, list[Boundary]]
    variant: str
    boundary: Boundary

    @classmethod
    def of(cls, bundle: Bundle, replayed: dict[str, list[Boundary]]) -> DriftError:
        """Return the error of what was replayed, in which at least one boundary has not passed."""
        failed = [(name, boundary) for name, found in replayed.items() for boundary in found if not boundary.passed]
        variant, first = min(failed, key=lambda pair: _place_in_chain(pair[1]))
        error = cls(
            f"{bundle.path}: {len(failed)} outputs of the golden cases differ from the recorded ones by more than "
            f"their tolerance, first {first.name} of variant {variant} (relative error {first.rel_l2:.2e}). This "
            "machine's engine computes something else: try another --variant, or another version of the engine; "
            "--bisect names the block in which it begins."
        )
        error.bundle, error.replayed, error.variant, error.boundary = bundle, replayed, variant, first
        return error

    @property
    def graph(self) -> str:
        """The graph that gives the first output that drifts."""
        return graph_of(self.boundary)


def graph_of(boundary: Boundary) -> str:
    """Return the graph of a replayed boundary, which is named `case/graph_i.tensor`."""
    return boundary.name.partition("/")[2].partition(".")[0].rpartition("_")[0]


def _place_in_chain(boundary: Boundary) -> int:
    graph = graph_of(boundary)
    return GRAPHS.index(graph) if graph in GRAPHS else len(GRAPHS)


def verify_bundle(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    variant: str | None = None,
    threads: int | None = None,
    report: Callable[[str], Any] | None = None,
) -> dict[str, list[Boundary]]:
    """Return the boundaries of each variant that was replayed, by variant; all have passed.

    Args:
        path: the bundle's folder.
        backend: "auto", or the name of an engine.
        variant: only this variant; None for every variant of the bundle that runs here.
        threads: CPU threads of an engine; None for its own default.
        report: is told in lines and tables what was done.

    Raises:
        BundleError: a hash differs; the message names the file.
        DriftError: an output leaves its tolerance; the message names the first one in the chain's order.
        EngineError: no variant runs here, or the one asked for does not.
    """
    report = report or (lambda text: None)
    bundle = bundles.verify(path)
    entries = bundle.manifest.entries()
    report(f"{len(entries)} files are whole ({sum(entry.size for entry in entries.values()) / 1e6:.1f} MB hashed)")
    known = list(dict.fromkeys(graph.variant for graph in bundle.manifest.all_graphs()))
    replayed: dict[str, list[Boundary]] = {}
    refusals: dict[str, EngineError] = {}
    for name in [variant] if variant else known:
        try:
            sessions = open_sessions(bundle, backend=backend, variant=name, threads=threads)
        except EngineError as error:
            refusals[name] = error
            continue
        try:
            replayed[name] = replay(bundle, sessions)
        finally:
            for session in sessions.values():
                session.close()
        report(f"variant {name}: {len(replayed[name])} outputs of the golden cases replayed")
        if replayed[name]:
            report(format_table(replayed[name]))
    if refusals and not replayed:
        raise next(iter(refusals.values()))
    for name, refusal in refusals.items():
        report(f"variant {name} was not replayed: {refusal}")
    if any(not boundary.passed for found in replayed.values() for boundary in found):
        raise DriftError.of(bundle, replayed)
    return replayed
