"""Narrow a drift to a named block: replay a golden case with the suspect graph and with one that is right, both tapped.

Two passes: first the last border of every block, then all borders between the last one that agrees and the first that
does not. Runs on the device too: it needs onnx, neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.export.parity.block_outputs import PREFIX, Border, borders, paired, require_onnx, write_tapped
from bridge_stg.runtime.backends.choose import choose, open_sessions
from bridge_stg.runtime.backends.session import KVCache, Session, SessionWrapper
from bridge_stg.runtime.backends.tensorrt.engine_cache import engine_folders
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import BundleError, EngineError
from bridge_stg.runtime.parity.compare import (
    TOLERANCES,
    Boundary,
    compare,
    format_table,
    replay,
    replay_cases,
    tolerance_of,
)
from bridge_stg.runtime.parity.golden import Tolerance
from bridge_stg.runtime.parity.verify import DriftError, verify_bundle

REFERENCE_BACKEND = "onnxruntime"
"""What a graph is compared on, if the suspect runs on another engine."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a variant of a graph of a bundle on a backend."""

    bundle: Bundle
    graph: str
    variant: str
    backend: str = REFERENCE_BACKEND

    def __str__(self) -> str:
        return f"{self.graph} ({self.variant}) of {self.bundle.path} on {self.backend}"

    @property
    def file(self) -> Path:
        return self.bundle.graph_path(self.graph, self.variant)


Prepare = Callable[[Side, Bundle], None]
"""Called with a side, and with a bundle of its graph alone, tapped, before it is opened on the side's backend."""


@dataclass(frozen=True)
class Finding:
    """Where a drift begins.

    Attributes:
        boundary: the graph's output that drifts, `case/graph_i.tensor`.
        block: the part of the model where it begins, such as `language_model.layers.3.mlp`.
        module: the module inside it whose output is the first that drifts.
        call: the recorded call in which it begins, `case/graph_i`.
        begins: the first border that drifts; None if none leaves its tolerance, and `block` is then the one behind
            which the error grows most.
        before: the last border ahead of it; None if there is none.
        borders: everything that was compared in the last pass, in the graph's order.
        reference: what the suspect was compared with.
        vanished: whether the output is right once the graph is tapped: then a fusion across the taps is at fault.
    """

    boundary: str
    block: str
    module: str
    call: str
    begins: Boundary | None
    before: Boundary | None
    borders: tuple[Boundary, ...]
    reference: str
    vanished: bool

    def __str__(self) -> str:
        ahead = f"relative error {self.before.rel_l2:.1e} ahead of it" if self.before else "nothing lies ahead of it"
        if self.begins is None:
            text = (
                f"no block alone leaves its tolerance; the error of {self.boundary} grows most in {self.block}, {ahead}"
            )
        else:
            text = (
                f"the drift of {self.boundary} begins in {self.block}, at the output of {self.module} "
                f"({ahead}, {self.begins.rel_l2:.1e} behind it"
                f"{', ' + self.begins.problem if self.begins.problem else ''}; call {self.call})"
            )
        if self.vanished:
            text += ". With taps the output is right, so the fault lies in kernels that the engine fuses across borders"
        return f"{text}. Compared with {self.reference}"


def bisect(
    suspect: Side,
    reference: Side,
    boundary: str,
    *,
    threads: int | None = None,
    prepare: Prepare | None = None,
    report: Callable[[str], Any] | None = None,
) -> Finding:
    """Find the block in which an output's drift begins.

    Args:
        suspect: what gives the wrong output.
        reference: the same graph of the same model, known to be right.
        boundary: the output that drifts, as `compare.replay` names it: `case/graph_i.tensor`.
        threads: CPU threads of an engine; None for its own default.
        prepare: makes what a backend must find beside a tapped graph, such as an engine that is built for it.
        report: is told what is done.

    Raises:
        BundleError: the two graphs share no named borders, or the boundary is none of the suspect's golden cases.
        EngineError: onnx is missing, or an engine refuses a tapped graph.
    """
    report = report or (lambda text: None)
    case, _, rest = boundary.partition("/")
    call = rest.partition(".")[0]
    folders = [folder for folder in suspect.bundle.golden_cases() if folder.name == case]
    if not folders:
        raise BundleError(f"{suspect.bundle.path}: has no golden case {case!r}, of which {boundary} is said to be.")
    pairs = paired(borders(suspect.file), borders(reference.file))
    if not pairs:
        raise BundleError(
            f"{suspect.file} and {reference.file} share no named module, so a drift cannot be narrowed. Compare "
            "exports of the same model."
        )
    replay = _Replay(suspect, reference, folders[0], f"{case}/{call}", threads, prepare)
    coarse = [i for i, (border, _) in enumerate(pairs) if border.block not in {b.block for b, _ in pairs[i + 1 :]}]
    report(f"bisecting {boundary}: {len(coarse)} blocks compared with {reference}")
    drifts, vanished = replay.compare([pairs[i] for i in coarse])
    first = _first(drifts)
    if first is None:
        first = _steepest(drifts)
    until = coarse[first.place]
    after = coarse[first.place - 1] + 1 if first.place else 0
    window = range(max(0, after - 1), until + 1)  # one that agrees is seen too
    report(f"bisecting {boundary}: {len(window)} outputs of {pairs[until][0].block} and ahead of it compared")
    fine, _ = replay.compare([pairs[i] for i in window])
    begins = _first(fine)
    chosen = begins or _steepest(fine)
    border = pairs[window[chosen.place]][0]
    ahead = [d for d in fine if d.call == chosen.call and d.place < chosen.place]
    return Finding(
        boundary=boundary,
        block=border.block,
        module=border.module,
        call=chosen.call,
        begins=chosen.boundary if begins else None,
        before=ahead[-1].boundary if ahead else None,
        borders=tuple(d.boundary for d in fine if d.call == chosen.call),
        reference=str(reference),
        vanished=vanished,
    )


def verify_and_bisect(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    variant: str | None = None,
    against: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    prepare: Prepare | None = None,
    report: Callable[[str], Any] | None = None,
) -> dict[str, list[Boundary]]:
    """Verify a bundle as `verify_bundle` does; where an output drifts, name the block in which that begins.

    Args:
        path, backend, variant, threads, report: as of `verify_bundle`.
        against: a bundle of the same model that is trusted; None: another variant of this bundle, or this one on
            onnxruntime, whichever agrees with the golden cases.
        prepare: as of `bisect`.

    Raises:
        BundleError: an output drifts; the message names output and block. Or as of `verify_bundle`.
        EngineError: onnx is missing.
    """
    report = report or (lambda text: None)
    require_onnx()
    trusted = None if against is None else Bundle.load(against)
    try:
        return verify_bundle(path, backend=backend, variant=variant, threads=threads, report=report)
    except DriftError as drift:
        target = choose(drift.bundle, backend=backend, variant=drift.variant)
        suspect = Side(drift.bundle, drift.graph, target.variants[drift.graph], target.backend)
        reference = find_reference(suspect, against=trusted, threads=threads)
        try:
            finding = bisect(suspect, reference, drift.boundary.name, threads=threads, prepare=prepare, report=report)
        except EngineError as error:
            where = f"{drift.bundle.path}: {drift.boundary.name} drifts"
            raise EngineError(f"{where}, and in which block that begins cannot be told: {error}") from error
        report(format_table(finding.borders))
        raise BundleError(f"{drift.bundle.path}: {finding}.") from drift


def find_reference(suspect: Side, *, against: Bundle | None = None, threads: int | None = None) -> Side:
    """Return what a suspect may be compared with: the first candidate that agrees with the suspect's golden cases.

    Raises:
        BundleError: none does; the message says what to give.
    """
    name, own = suspect.graph, suspect.bundle
    if against is not None:
        variants = sorted(against.manifest.graphs.get(name, {}), key=lambda variant: variant != suspect.variant)
        candidates = [Side(against, name, variant) for variant in variants]
    else:
        variants = sorted(own.manifest.graphs[name], key=lambda v: own.graph(name, v).made_by_pass)
        candidates = [Side(own, name, v, suspect.backend) for v in variants if v != suspect.variant]
        if suspect.backend != REFERENCE_BACKEND:
            candidates += [Side(own, name, v, REFERENCE_BACKEND) for v in variants]
    for candidate in candidates:
        if _agrees(candidate, own, threads):
            return candidate
    tried = ", ".join(str(candidate) for candidate in candidates) or "nothing"
    raise BundleError(
        f"{own.path}: {name} ({suspect.variant}) drifts, and there is nothing to compare it with block by block: "
        f"{tried} does not agree with the golden cases either. Give a bundle of the same model that is right: "
        "--bisect --against BUNDLE"
    )


def _agrees(side: Side, golden: Bundle, threads: int | None) -> bool:
    one = {side.graph: {side.variant: side.bundle.graph(side.graph, side.variant)}}
    alone = Bundle(side.bundle.path, dataclasses.replace(side.bundle.manifest, graphs=one))
    try:
        sessions = open_sessions(alone, backend=side.backend, variant=side.variant, threads=threads)
    except EngineError:
        return False
    try:
        return all(boundary.passed for boundary in replay(golden, sessions, graphs=[side.graph]))
    finally:
        for session in sessions.values():
            session.close()


@dataclass(frozen=True)
class _Drift:
    """One tap of one call, compared."""

    call: str
    place: int
    boundary: Boundary


class _Replay:
    """Replays one golden case on both sides, with the same taps."""

    def __init__(
        self, suspect: Side, reference: Side, folder: Path, last: str, threads: int | None, prepare: Prepare | None
    ) -> None:
        self.suspect, self.reference = suspect, reference
        self.folder, self.last, self.threads, self.prepare = folder, last, threads, prepare

    def compare(self, pairs: Sequence[tuple[Border, Border]]) -> tuple[list[_Drift], bool]:
        """Return every tap of every call up to the last one, and whether all of the suspect's outputs are right."""
        expected, _ = self._run(self.reference, [border for _, border in pairs])
        actual, passed = self._run(self.suspect, [border for border, _ in pairs])
        tolerance = self._tolerance()
        drifts = []
        for call, taps in actual.items():
            for place, (border, _) in enumerate(pairs):
                reference = expected[call][place]
                if reference.size != taps[place].size or not np.isfinite(reference).all():
                    continue  # not the same tensor after all, or rows that nobody reads and that may hold anything
                compared = compare(f"{border.block}: {border.module}", reference, taps[place], tolerance=tolerance)
                drifts.append(_Drift(call, place, compared))
        if not drifts:
            raise EngineError(f"{self.reference}: gives no finite tensor to compare with in {self.last}.")
        return drifts, passed

    def _run(self, side: Side, taps: Sequence[Border]) -> tuple[dict[str, list[np.ndarray]], bool]:
        with _tapped_session(side, taps, self.threads, self.prepare) as recorder:
            found = replay_cases(
                [self.folder],
                {side.graph: recorder},
                graphs=[side.graph],
                progress=recorder.begin,
            )
        at = list(recorder.calls).index(self.last)
        return dict(list(recorder.calls.items())[: at + 1]), all(boundary.passed for boundary in found)

    def _tolerance(self) -> Tolerance:
        """The looser of both sides' precisions."""
        sides = (self.suspect, self.reference)
        precisions = [side.bundle.graph(side.graph, side.variant).precision for side in sides]
        known = [tolerance_of(precision, "tap") or TOLERANCES["float32"] for precision in precisions]
        return max(known, key=lambda tolerance: tolerance.rel_l2)


@contextmanager
def _tapped_session(
    side: Side, taps: Sequence[Border], threads: int | None, prepare: Prepare | None
) -> Iterator[_Recorder]:
    parent = side.bundle.path.parent if os.access(side.bundle.path.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f".{side.bundle.path.name}.partial", dir=parent) as folder:
        tapped = write_tapped(side.bundle, side.graph, side.variant, taps, Path(folder))
        if prepare is not None:
            prepare(side, tapped)
        try:
            sessions = open_sessions(tapped, backend=side.backend, variant=side.variant, threads=threads)
            recorder = _Recorder(sessions[side.graph], len(taps))
            try:
                yield recorder
            finally:
                recorder.close()
        finally:  # a provider that compiles by itself keeps what it made outside of the bundle
            shutil.rmtree(engine_folders(tapped)[1], ignore_errors=True)


class _Recorder(SessionWrapper):
    """A session that keeps its taps, call by call, and hands the other outputs on."""

    def __init__(self, session: Session, count: int) -> None:
        super().__init__(session)
        self._count = count
        self._call = ""
        self.calls: dict[str, list[np.ndarray]] = {}

    def begin(self, call: str) -> None:
        self._call = call

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, np.ndarray]:
        outputs = self.session.infer(feeds, cache=cache)
        self.calls[self._call] = [outputs.pop(f"{PREFIX}{place}") for place in range(self._count)]
        return outputs


def _first(drifts: Sequence[_Drift]) -> _Drift | None:
    """The first tap that leaves its tolerance, in the earliest call that has one."""
    return next((drift for drift in drifts if not drift.boundary.passed), None)


def _steepest(drifts: Sequence[_Drift]) -> _Drift:
    """The tap whose error stands highest above that of the tap ahead of it."""
    last = [drift for drift in drifts if drift.call == drifts[-1].call]
    floor = float(np.finfo(np.float32).eps)
    ahead = [floor, *(max(floor, drift.boundary.rel_l2) for drift in last)]
    return max(zip(last, ahead), key=lambda pair: pair[0].boundary.rel_l2 / pair[1])[0]
