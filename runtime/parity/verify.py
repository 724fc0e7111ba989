"""Verify a bundle on this machine: hash every file, then replay the golden cases with every variant that can run."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from typing import Any

from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.reports import check_reports
from bridge_stg.runtime.errors import BundleError, EngineError
from bridge_stg.runtime.parity.compare import Boundary, format_table, replay


class DriftError(BundleError):
    """Outputs of golden cases that differ from the recorded ones by more than their tolerance.

    `variant`, `graph` and `boundary` are those of the first failed output in chain order; `replayed` contains every
    boundary that was compared, by variant.
    """

    def __init__(self, bundle: Bundle, replayed: dict[str, list[Boundary]]) -> None:
        failed = [(name, boundary) for name, found in replayed.items() for boundary in found if not boundary.passed]
        order = {graph: place for place, graph in enumerate(GRAPHS)}
        self.variant, self.boundary = min(failed, key=lambda pair: order.get(graph_of(pair[1]), len(order)))
        self.bundle, self.replayed, self.graph = bundle, replayed, graph_of(self.boundary)
        super().__init__(
            "bundle.drift",
            f"{bundle.path}: {len(failed)} outputs of the golden cases exceed their tolerance, first "
            f"{self.boundary.name} of variant {self.variant} (relative error {self.boundary.rel_l2:.2e}). Try another "
            "--variant, or another version of the backend; --bisect names the block where the difference begins.",
        )

    def __reduce__(self) -> tuple[type[DriftError], tuple[Bundle, dict[str, list[Boundary]]]]:
        return DriftError, (self.bundle, self.replayed)


def graph_of(boundary: Boundary) -> str:
    """Return the graph of a replayed boundary, which is named `case/graph_i.tensor`."""
    return boundary.name.partition("/")[2].partition(".")[0].rpartition("_")[0]


def verify_bundle(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    variant: str | None = None,
    threads: int | None = None,
    report: Callable[[str], Any] | None = None,
) -> dict[str, list[Boundary]]:
    """Hash a bundle's files and replay its golden cases. Return the compared boundaries by variant; all have passed.

    Without a variant, every variant of the bundle that runs on this machine is replayed; if the bundle's precision
    runs on other devices only, the result is empty. `report` is called with lines and tables of the progress.

    Raises:
        BundleError: a hash differs; the message names the file.
        DriftError: an output exceeds its tolerance; the message names the first one in chain order.
        EngineError: no variant runs on this machine, or the requested one does not.
    """
    report = report or (lambda text: None)
    bundle = Bundle.load(path, check="all")
    entries, reports = bundle.manifest.entries(), check_reports(path)
    size = sum(entry.size for entry in entries.values()) / 1e6
    report(f"{len(entries)} files and {reports} in reports/ are unchanged ({size:.1f} MB hashed)")
    replayed: dict[str, list[Boundary]] = {}
    failures: dict[str, EngineError] = {}
    for name in [variant] if variant else list(dict.fromkeys(g.variant for g in bundle.manifest.all_graphs())):
        try:
            replayed[name] = replay_variant(bundle, name, backend=backend, threads=threads)
        except EngineError as error:
            failures[name] = error
            continue
        report(f"variant {name}: {len(replayed[name])} outputs of the golden cases replayed")
        if replayed[name]:
            report(format_table(replayed[name]))
    requested = variant is not None or backend != "auto"
    if failures and not replayed and (requested or {e.code for e in failures.values()} != {"engine.no_variant"}):
        raise next(iter(failures.values()))
    for name, failure in failures.items():
        report(f"variant {name} was not replayed: {failure}")
    if any(not boundary.passed for found in replayed.values() for boundary in found):
        raise DriftError(bundle, replayed)
    if count := sum(map(len, replayed.values())):
        report(f"passed: all {count} outputs are within their tolerances")
    return replayed


def replay_variant(
    bundle: Bundle, variant: str, *, backend: str = "auto", threads: int | None = None, cases: Bundle | None = None
) -> list[Boundary]:
    """Replay golden cases of `cases`, or of the bundle, with one variant of it. Raises as `open_sessions` does."""
    with closing(open_sessions(bundle, backend=backend, variant=variant, threads=threads)) as sessions:
        return replay(cases or bundle, sessions)
