"""Narrow a drift to a block: replay a golden case with the drifting graph and a correct one, and compare block outputs.

Two passes: first the last output of every block, then all outputs between the last block that agrees and the first that
does not. Runs on the device too: it needs onnx, but neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.export.graph.graph_check import require_onnx
from bridge_stg.export.parity.block_outputs import PREFIX, BlockOutput, block_outputs, expose_outputs, pair_outputs
from bridge_stg.runtime.backends.choose import choose, open_sessions
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.backends.tensorrt.engine_cache import engine_folders
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import BundleError, EngineError
from bridge_stg.runtime.host.files import temporary_sibling
from bridge_stg.runtime.parity import compare as parity
from bridge_stg.runtime.parity.compare import Boundary, format_table
from bridge_stg.runtime.parity.recording import Call, RecordingSession
from bridge_stg.runtime.parity.verify import DriftError, verify_bundle

REFERENCE_BACKEND = "onnxruntime"
"""Backend of the reference, if the drifting graph runs on another one."""


@dataclass(frozen=True)
class Side:
    """One of the two sides of the comparison: a variant of a graph of a bundle on a backend."""

    bundle: Bundle
    graph: str
    variant: str
    backend: str = REFERENCE_BACKEND

    def __str__(self) -> str:
        return f"{self.graph} ({self.variant}) of {self.bundle.path} on {self.backend}"

    @property
    def file(self) -> Path:
        """Path of the .onnx file."""
        return self.bundle.graph_path(self.graph, self.variant)


Prepare = Callable[[Side, Bundle], None]
"""Called with a side, and with a bundle of its graph with block outputs, before the side's backend opens it."""


@dataclass(frozen=True)
class DriftOrigin:
    """The place where a drift begins.

    Attributes:
        boundary: drifting output of the graph, `case/graph_i.tensor`.
        block: block in which the drift begins, such as `language_model.layers.3.mlp`.
        module: module of the block whose output is the first that drifts.
        call: recorded call in which the drift begins, `case/graph_i`.
        begins: first block output that drifts; None if none leaves its tolerance, and `block` is then the one in which
            the error grows most.
        before: last block output before it; None if there is none.
        compared: all block outputs of the last pass, in the graph's order.
        reference: what the graph was compared with.
        vanished: whether the output is correct once the graph returns block outputs: then a kernel that the engine
            fuses across blocks is wrong.
    """

    boundary: str
    block: str
    module: str
    call: str
    begins: Boundary | None
    before: Boundary | None
    compared: tuple[Boundary, ...]
    reference: str
    vanished: bool

    def __str__(self) -> str:
        before = f"relative error {self.before.rel_l2:.1e} before it" if self.before else "nothing comes before it"
        if self.begins is None:
            text = f"no block leaves its tolerance; the error of {self.boundary} grows most in {self.block}, {before}"
        else:
            problem = f", {self.begins.problem}" if self.begins.problem else ""
            text = (
                f"the drift of {self.boundary} begins in {self.block}, at the output of {self.module} "
                f"({before}, {self.begins.rel_l2:.1e} after it{problem}; call {self.call})"
            )
        if self.vanished:
            text += ". With block outputs the result is correct: the fault is in kernels fused across blocks"
        return f"{text}. Compared with {self.reference}"


def bisect(
    suspect: Side,
    reference: Side,
    boundary: str,
    *,
    threads: int | None = None,
    prepare: Prepare | None = None,
    report: Callable[[str], Any] = lambda text: None,
) -> DriftOrigin:
    """Find the block in which an output's drift begins.

    Args:
        suspect: side with the wrong output.
        reference: same graph of the same model with correct outputs.
        boundary: drifting output, as `compare.replay` names it: `case/graph_i.tensor`.
        threads: CPU threads of a backend; None for its default.
        prepare: function that makes what a backend needs for a changed graph, such as an engine.
        report: called with a line per pass.

    Raises:
        BundleError: the two graphs share no named modules, or the boundary is not in the suspect's golden cases.
        EngineError: onnx is missing, or a backend cannot run a graph with block outputs.
    """
    case, _, rest = boundary.partition("/")
    call = rest.partition(".")[0]
    folder = next((folder for folder in suspect.bundle.golden_cases() if folder.name == case), None)
    if folder is None:
        raise BundleError("bundle.bad_golden_case", f"{suspect.bundle.path}: has no golden case {case!r} ({boundary}).")
    pairs = pair_outputs(block_outputs(suspect.file), block_outputs(reference.file))
    if not pairs:
        message = f"{suspect.file} and {reference.file} share no named module; compare exports of the same model"
        raise BundleError("bundle.other_model", message)
    replay = _Replay(suspect, reference, folder, f"{case}/{call}", threads, prepare)
    coarse = [i for i, (output, _) in enumerate(pairs) if output.block not in {b.block for b, _ in pairs[i + 1 :]}]
    report(f"bisecting {boundary}: {len(coarse)} blocks compared with {reference}")
    drifts, vanished = replay.compare([pairs[i] for i in coarse])
    first = _first(drifts) or _steepest(drifts)
    until = coarse[first.place]
    after = coarse[first.place - 1] + 1 if first.place else 0
    window = range(max(0, after - 1), until + 1)  # including one that agrees
    report(f"bisecting {boundary}: {len(window)} outputs of {pairs[until][0].block} and before it compared")
    fine, _ = replay.compare([pairs[i] for i in window])
    begins = _first(fine)
    chosen = begins or _steepest(fine)
    output = pairs[window[chosen.place]][0]
    before = [d for d in fine if d.call == chosen.call and d.place < chosen.place]
    return DriftOrigin(
        boundary=boundary,
        block=output.block,
        module=output.module,
        call=chosen.call,
        begins=chosen.boundary if begins else None,
        before=before[-1].boundary if before else None,
        compared=tuple(d.boundary for d in fine if d.call == chosen.call),
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
    report: Callable[[str], Any] = lambda text: None,
) -> dict[str, list[Boundary]]:
    """Verify a bundle with `verify_bundle`; where an output drifts, name the block in which the drift begins.

    The reference is the bundle `against`, a correct one of the same model, or else another variant of this bundle, or
    this one on onnxruntime, whichever agrees with the golden cases. Other arguments: see `verify_bundle` and `bisect`.

    Raises:
        BundleError: an output drifts; the message names output and block. Or as in `verify_bundle`.
        EngineError: onnx is missing.
    """
    require_onnx()
    trusted = None if against is None else Bundle.load(against)
    try:
        return verify_bundle(path, backend=backend, variant=variant, threads=threads, report=report)
    except DriftError as drift:
        chosen = choose(drift.bundle, backend=backend, variant=drift.variant)
        suspect = Side(drift.bundle, drift.graph, chosen.variants[drift.graph], chosen.backend)
        reference = find_reference(suspect, against=trusted, threads=threads)
        try:
            origin = bisect(suspect, reference, drift.boundary.name, threads=threads, prepare=prepare, report=report)
        except EngineError as error:
            where = f"{drift.bundle.path}: {drift.boundary.name} drifts"
            raise EngineError(error.code, f"{where}, but its block cannot be determined: {error}") from error
        report(format_table(origin.compared))
        raise BundleError(drift.code, f"{drift.bundle.path}: {origin}.") from drift


def find_reference(suspect: Side, *, against: Bundle | None = None, threads: int | None = None) -> Side:
    """Return the first side that agrees with the suspect's golden cases; raise BundleError if none does."""
    name, own = suspect.graph, suspect.bundle
    if against is not None:
        variants = sorted(against.manifest.graphs.get(name, {}), key=lambda variant: variant != suspect.variant)
        candidates = [Side(against, name, variant) for variant in variants]
    else:
        variants = sorted(own.manifest.graphs[name], key=lambda v: own.graph(name, v).made_by_pass)
        candidates = [Side(own, name, v, suspect.backend) for v in variants if v != suspect.variant]
        if suspect.backend != REFERENCE_BACKEND:
            candidates += [Side(own, name, v, REFERENCE_BACKEND) for v in variants]
    found = next((candidate for candidate in candidates if _agrees(candidate, own, threads)), None)
    if found is not None:
        return found
    tried = ", ".join(str(candidate) for candidate in candidates) or "nothing"
    drift = f"{own.path}: {name} ({suspect.variant}) drifts, and so does what it could be compared with ({tried})"
    advice = "Give a correct bundle of the same model: --bisect --against BUNDLE"
    raise BundleError("bundle.no_reference", f"{drift}. {advice}")


def _agrees(side: Side, golden: Bundle, threads: int | None) -> bool:
    one = {side.graph: {side.variant: side.bundle.graph(side.graph, side.variant)}}
    alone = Bundle(side.bundle.path, dataclasses.replace(side.bundle.manifest, graphs=one))
    try:
        sessions = open_sessions(alone, backend=side.backend, variant=side.variant, threads=threads)
    except EngineError:
        return False
    with closing(sessions[side.graph]):
        return all(boundary.passed for boundary in parity.replay(golden, sessions, graphs=[side.graph]))


@dataclass(frozen=True)
class _Drift:
    """The comparison of one block output of one call; `place` is its index in the pass."""

    call: str
    place: int
    boundary: Boundary


@dataclass(frozen=True)
class _Replay:
    """Replays one golden case on both sides, with the same block outputs, up to the call `last`."""

    suspect: Side
    reference: Side
    folder: Path
    last: str
    threads: int | None
    prepare: Prepare | None

    def compare(self, pairs: Sequence[tuple[BlockOutput, BlockOutput]]) -> tuple[list[_Drift], bool]:
        """Compare the block outputs of every call up to the last; also return if the suspect's outputs are correct."""
        expected, _ = self._run(self.reference, [output for _, output in pairs])
        actual, passed = self._run(self.suspect, [output for output, _ in pairs])
        graphs = [side.bundle.graph(side.graph, side.variant) for side in (self.suspect, self.reference)]
        known = [parity.tolerance_of(graph.precision, PREFIX) or parity.TOLERANCES["float32"] for graph in graphs]
        looser = max(known, key=lambda tolerance: tolerance.rel_l2)
        drifts = []
        for call, found in actual.items():
            for place, (output, _) in enumerate(pairs):
                reference = expected[call][place]
                if reference.size != found[place].size or not np.isfinite(reference).all():
                    continue  # not the same tensor after all, or rows that nobody reads, with any values
                name = f"{output.block}: {output.module}"
                compared = parity.compare(name, reference, found[place], tolerance=looser)
                drifts.append(_Drift(call, place, compared))
        if not drifts:
            message = f"{self.reference}: returns no finite tensor to compare with in {self.last}."
            raise EngineError("engine.not_finite", message)
        return drifts, passed

    def _run(self, side: Side, outputs: Sequence[BlockOutput]) -> tuple[dict[str, list[np.ndarray]], bool]:
        calls: list[Call] = []
        names: list[str] = []
        with _session_with_outputs(side, outputs, self.threads, self.prepare) as session:
            recording = {side.graph: RecordingSession(session, calls)}
            replayed = parity.replay([self.folder], recording, graphs=[side.graph], progress=names.append)
        until = names.index(self.last) + 1
        found = {
            name: [values[f"{PREFIX}{place}"] for place in range(len(outputs))]
            for name, (_, _, values) in zip(names[:until], calls[:until], strict=True)
        }
        return found, all(boundary.passed for boundary in replayed)


@contextmanager
def _session_with_outputs(
    side: Side, outputs: Sequence[BlockOutput], threads: int | None, prepare: Prepare | None
) -> Iterator[Session]:
    place = side.bundle.path
    place = place if os.access(place.parent, os.W_OK) else Path(tempfile.gettempdir()) / place.name
    with temporary_sibling(place) as folder, ExitStack() as stack:
        folder.mkdir()
        exposed = expose_outputs(side.bundle, side.graph, side.variant, outputs, folder)
        if prepare is not None:
            prepare(side, exposed)
        # A provider that compiles by itself keeps its engines outside of the bundle.
        stack.callback(shutil.rmtree, engine_folders(exposed)[1], ignore_errors=True)
        session = open_sessions(exposed, backend=side.backend, variant=side.variant, threads=threads)[side.graph]
        yield stack.enter_context(closing(session))


def _first(drifts: Sequence[_Drift]) -> _Drift | None:
    """Return the first block output that leaves its tolerance, in the earliest call that has one."""
    return next((drift for drift in drifts if not drift.boundary.passed), None)


def _steepest(drifts: Sequence[_Drift]) -> _Drift:
    """Return the block output of the last call whose error exceeds that of the output before it by most."""
    last = [drift for drift in drifts if drift.call == drifts[-1].call]
    floor = float(np.finfo(np.float32).eps)
    before = [floor, *(max(floor, drift.boundary.rel_l2) for drift in last)]
    return max(zip(last, before), key=lambda pair: pair[0].boundary.rel_l2 / pair[1])[0]
