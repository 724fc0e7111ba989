"""What runs where: which backend this machine has, which variant of each graph it gets, and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bridge_stg.runtime.backends import registry as table
from bridge_stg.runtime.backends.pending import PendingSession, open_in_order
from bridge_stg.runtime.backends.registry import BACKENDS, Backend
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.manifest import GraphSpec, Manifest
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import DeviceFacts
from bridge_stg.runtime.errors import EngineError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenBackend:
    """The backend and the variant of each graph that were chosen for this machine, and why.

    `device` names the GPU, or is "CPU".
    """

    backend: str
    version: str
    variants: Mapping[str, str]
    device: str = "CPU"
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.summary} ({self.reason})"

    @property
    def summary(self) -> str:
        """Backend, version, device and variants in a few words."""
        return f"{self.backend} {self.version} on {self.device}, {', '.join(dict.fromkeys(self.variants.values()))}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "backend": self.backend,
            "version": self.version,
            "device": self.device,
            "variants": dict(self.variants),
            "reason": self.reason,
        }


class Sessions(dict[str, Session]):
    """Open sessions by graph name, and the target that they run on."""

    def __init__(self, target: ChosenBackend) -> None:
        super().__init__()
        self.target = target


def choose(
    bundle: Bundle | Manifest,
    *,
    backend: str = "auto",
    variant: str | None = None,
    backends: tuple[Backend, ...] | None = None,
) -> ChosenBackend:
    """Pick the backend, and a variant of each graph of the bundle.

    Args:
        bundle: of a manifest alone, built engines cannot be found.
        backend: the name of a backend, or "auto": the first of `BACKENDS` that has all that it needs here.
        variant: the variant to use of every graph, or, of graphs that have none, the one that it is derived from;
            None: the best that backend and bundle have in common.
        backends: those to choose from; None: all.

    Raises:
        EngineError: the backend is unknown or not installed, or it cannot run what the bundle holds.
    """
    known = {b.name: b for b in (BACKENDS if backends is None else backends)}
    if backend != "auto" and backend not in known:
        raise EngineError(f"backend {backend!r} is unknown; known: auto, {', '.join(known)}.")
    candidates = [b for b in known.values() if b.automatic] if backend == "auto" else [known[backend]]
    machine, problems = _Machine(), []
    for candidate in candidates:
        try:
            version, device, variants = _fitting(candidate, bundle, variant, machine)
        except EngineError as error:
            problems.append(str(error))
            continue
        reason = "asked for" if backend != "auto" else "the first of those preferred that is ready here"
        passed_over = "".join(f"; not taken: {problem}" for problem in problems)
        return ChosenBackend(candidate.name, version, variants, device, reason + passed_over)
    raise EngineError(f"no backend can run this bundle here: {'; '.join(problems)}.")


class _Machine:
    """Asks for the GPU once, and only if a backend needs it."""

    def __init__(self) -> None:
        self._found: DeviceFacts | EngineError | None = None

    def gpu(self) -> DeviceFacts:
        if self._found is None:
            try:
                self._found = table.gpu()
            except EngineError as error:
                self._found = error
        if isinstance(self._found, EngineError):
            raise self._found
        return self._found


def _fitting(
    backend: Backend, bundle: Bundle | Manifest, variant: str | None, machine: _Machine
) -> tuple[str, str, dict[str, str]]:
    """Return a backend's version, its device and the variant of each graph. Raises EngineError with what is missing."""
    version = backend.version()
    if version is None:
        install = f'pip install "bridge-stg[{backend.extra}]"'
        raise EngineError(f"backend {backend.name!r} is not installed (install it with: {install})")
    manifest = bundle.manifest if isinstance(bundle, Bundle) else bundle
    bases = {graph.derived_from for graph in manifest.all_graphs() if graph.variant == variant} - {None, variant}
    runnable = backend.variants(_numbers(version))
    order = runnable
    if variant is not None:  # a graph that lacks it runs what it is derived from, on a backend that could run it
        order = tuple(v for v in (variant, *sorted(map(str, bases))) if v in runnable) if variant in runnable else ()
    able = {name: [v for v in order if v in variants] for name, variants in manifest.graphs.items()}
    for name, variants in able.items():
        if not variants:
            asked = f"variant {variant!r} was asked for, " if variant else ""
            raise EngineError(
                f"{asked}{backend.name} {version} runs the variants {', '.join(runnable)}, and graph {name!r} of this "
                f"bundle has {', '.join(manifest.graphs[name])}"
            )
    if not backend.on_gpu:
        return version, "CPU", {name: variants[0] for name, variants in able.items()}
    try:
        facts = machine.gpu()
    except EngineError as error:
        raise EngineError(f"backend {backend.name!r} has no GPU: {error}") from error
    chosen = {name: _accepted(backend, bundle, name, variants, version, facts) for name, variants in able.items()}
    return version, f"{facts.name} (SM {facts.sm})", chosen


def _accepted(
    backend: Backend, bundle: Bundle | Manifest, name: str, variants: list[str], version: str, facts: DeviceFacts
) -> str:
    """Return the first variant of a graph that a GPU backend does not refuse. Raises EngineError with its reason."""
    if backend.refuses is None or not isinstance(bundle, Bundle):
        return variants[0]
    refusals = []
    for variant in variants:
        refusal = backend.refuses(bundle, bundle.graph(name, variant), version, facts)
        if refusal is None:
            return variant
        refusals.append(refusal)
    raise EngineError(f"backend {backend.name!r} is not ready: {refusals[0]}")


def open_sessions(
    bundle: Bundle,
    *,
    backend: str = "auto",
    variant: str | None = None,
    threads: int | None = None,
    wait: bool = True,
) -> Sessions:
    """Open every graph of a bundle on the target that `choose` picks; on a GPU they share one device context.

    Args:
        bundle: its files have been checked.
        backend, variant: as of `choose`.
        threads: CPU threads of an engine; None for its own default.
        wait: whether to return when all are open. Else, on CPU, they are opened in another thread, in the order in
            which a chain needs them; a call waits for its own, and raises what the opening raised.

    Raises:
        EngineError: as `choose`, or the backend refuses a graph; the sessions opened so far are closed.
    """
    target = choose(bundle, backend=backend, variant=variant)
    _log.info("running %s on %s", bundle.path, target)
    sessions = Sessions(target)
    if not wait and not _backend(target).on_gpu:
        pending = {
            name: PendingSession(bundle.graph(name, chosen), partial(open_graph, bundle, name, target, threads=threads))
            for name, chosen in target.variants.items()
        }
        sessions.update(pending)
        open_in_order([pending[name] for name in sorted(pending, key=_place_in_chain)])
        return sessions
    device = DeviceContext().open() if _backend(target).on_gpu else None
    try:
        for name in target.variants:
            sessions[name] = open_graph(bundle, name, target, threads=threads, device=device)
    except BaseException:
        for session in sessions.values():
            session.close()
        raise
    finally:
        if device is not None:
            device.close()  # the sessions hold it from here on
    return sessions


def _place_in_chain(graph: str) -> int:
    return GRAPHS.index(graph) if graph in GRAPHS else len(GRAPHS)


def open_graph(
    bundle: Bundle, name: str, target: ChosenBackend, *, threads: int | None = None, device: DeviceContext | None = None
) -> Session:
    """Open one graph of a bundle on a target. Raises EngineError where the backend refuses it."""
    graph: GraphSpec = bundle.graph(name, target.variants[name])
    opened = _backend(target).open
    return opened(bundle, graph, threads) if device is None else opened(bundle, graph, threads, device)


def _backend(target: ChosenBackend) -> Backend:
    return next(b for b in BACKENDS if b.name == target.backend)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "1.32.0rc1" → (1, 32)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
