"""Verify a bundle on this machine: hash every file, then replay the golden cases with every variant that runs here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bridge_stg.runtime import bundle as bundles
from bridge_stg.runtime.compare import Boundary, format_table, replay
from bridge_stg.runtime.errors import BundleError, EngineError
from bridge_stg.runtime.targets import open_sessions


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
        BundleError: a hash differs, or an output leaves its tolerance; the message names the file or boundary.
        EngineError: no variant runs here, or the one asked for does not.
    """
    report = report or (lambda text: None)
    bundle = bundles.verify(path)
    entries = bundle.manifest.entries()
    report(f"{len(entries)} files are whole ({sum(entry.size for entry in entries.values()) / 1e6:.1f} MB hashed)")
    known = list(dict.fromkeys(graph.variant for graph in bundle.manifest.all_graphs()))
    replayed: dict[str, list[Boundary]] = {}
    refusals: list[EngineError] = []
    for name in [variant] if variant else known:
        try:
            sessions = open_sessions(bundle, backend=backend, variant=name, threads=threads)
        except EngineError as error:
            refusals.append(error)
            report(f"variant {name} was not replayed: {error}")
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
        raise refusals[0]
    failed = [(name, boundary) for name, found in replayed.items() for boundary in found if not boundary.passed]
    if failed:
        name, boundary = failed[0]
        raise BundleError(
            f"{bundle.path}: {len(failed)} outputs of the golden cases differ from the recorded ones by more than "
            f"their tolerance, first {boundary.name} of variant {name} (relative error {boundary.rel_l2:.2e}). This "
            "machine's engine computes something else: try another --variant, or another version of the engine."
        )
    return replayed
