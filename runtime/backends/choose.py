"""Choose the backend for this machine and the variant of each graph, and open its sessions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from bridge_stg.runtime.backends import registry
from bridge_stg.runtime.backends.pending import open_in_order
from bridge_stg.runtime.backends.registry import BACKENDS, Backend
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.manifest import GraphSpec, Manifest
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import DeviceFacts
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.packages import install_command, version_numbers

LATEST = (999,)
"""A version that no backend has reached."""

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
    """Open sessions by graph name, and the backend that was chosen for them."""

    def __init__(self, target: ChosenBackend) -> None:
        super().__init__()
        self.target = target

    def close(self) -> None:
        """Close every session."""
        for session in self.values():
            session.close()


def choose(bundle: Bundle | Manifest, *, backend: str = "auto", variant: str | None = None) -> ChosenBackend:
    """Pick the backend, and a variant of each graph of the bundle.

    Args:
        bundle: bundle, or a manifest alone, for which built engines cannot be found.
        backend: name of a backend, or "auto": the first of `BACKENDS` that is ready for every graph.
        variant: variant of every graph; graphs without it use the variant that it is derived from. None: the best
            variant of each graph that the backend runs.

    Raises:
        EngineError: the backend is unknown or not installed, or it cannot run the bundle.
    """
    known = {b.name: b for b in BACKENDS}
    if backend != "auto" and backend not in known:
        raise EngineError("engine.unknown_backend", f"backend {backend!r} is unknown; known: auto, {', '.join(known)}.")
    candidates = [b for b in known.values() if b.automatic] if backend == "auto" else [known[backend]]
    gpu, problems, code = cache(registry.gpu), [], "engine.no_backend"
    for candidate in candidates:
        try:
            version, device, variants = _fitting(candidate, bundle, variant, gpu)
        except EngineError as error:
            problems.append(str(error))
            code = error.code if backend != "auto" else code
            continue
        reason = "requested" if backend != "auto" else "the most preferred backend that is ready here"
        reason += "".join(f"; not chosen: {problem}" for problem in problems)
        if "standard" in set(candidate.variants(LATEST)) - set(candidate.variants(version_numbers(version))):
            taken = " and ".join(sorted(set(variants.values())))
            reason += f"; this version does not run the variant standard, so {taken} is taken"
        return ChosenBackend(candidate.name, version, variants, device, reason)
    raise EngineError(code, f"no backend can run this bundle here: {'; '.join(problems)}.")


def _fitting(
    backend: Backend, bundle: Bundle | Manifest, variant: str | None, gpu: Callable[[], DeviceFacts]
) -> tuple[str, str, dict[str, str]]:
    """Return version, device and the variant of each graph. Raises EngineError that names what is missing."""
    version = backend.version()
    if version is None:
        install = install_command(backend.extra)
        message = f"backend {backend.name!r} is not installed (install it with: {install})"
        raise EngineError("engine.not_installed", message)
    manifest = bundle.manifest if isinstance(bundle, Bundle) else bundle
    bases = {graph.derived_from for graph in manifest.all_graphs() if graph.variant == variant} - {None, variant}
    runnable = backend.variants(version_numbers(version))
    order = runnable
    if variant is not None:  # graphs that lack it use the variant that it is derived from
        order = tuple(v for v in (variant, *sorted(map(str, bases))) if v in runnable) if variant in runnable else ()
    able = {name: [v for v in order if v in variants] for name, variants in manifest.graphs.items()}
    for name, variants in able.items():
        if not variants:
            requested = f"variant {variant!r} was requested, " if variant else ""
            raise EngineError(
                "engine.no_variant",
                f"{requested}{backend.name} {version} runs the variants {', '.join(runnable)}, but graph {name!r} of "
                f"this bundle has {', '.join(manifest.graphs[name])}",
            )
    if not backend.on_gpu:
        return version, "CPU", {name: variants[0] for name, variants in able.items()}
    try:
        facts = gpu()
    except EngineError as error:
        raise EngineError(error.code, f"backend {backend.name!r} has no GPU: {error}") from error
    chosen = {}
    for name, variants in able.items():
        problems: list[str | None] = [None]
        if backend.problem is not None and isinstance(bundle, Bundle):
            problems = [backend.problem(bundle, bundle.graph(name, v), version, facts) for v in variants]
        if None not in problems:
            raise EngineError("engine.not_ready", f"backend {backend.name!r} is not ready: {problems[0]}")
        chosen[name] = variants[problems.index(None)]
    return version, f"{facts.name} (SM {facts.sm})", chosen


def open_sessions(
    bundle: Bundle,
    *,
    backend: str = "auto",
    variant: str | None = None,
    threads: int | None = None,
    wait: bool = True,
) -> Sessions:
    """Open every graph of a bundle on the backend that `choose` picks; on a GPU they share one device context.

    `threads` are CPU threads per session (None: the backend's default). Without `wait`, sessions on CPU are opened in
    another thread, in the order of the chain; a call waits for its session, and raises the error of opening it. Raises
    EngineError as `choose` does, or if the backend rejects a graph; the sessions opened so far are closed.
    """
    target = choose(bundle, backend=backend, variant=variant)
    _log.info("running %s on %s", bundle.path, target)
    sessions = Sessions(target)
    if not wait and not _backend(target).on_gpu:
        openers = {}
        for name in sorted(target.variants, key=lambda name: (*GRAPHS, name).index(name)):
            opener = partial(open_graph, bundle, name, target, threads=threads)
            openers[name] = bundle.graph(name, target.variants[name]), opener
        sessions.update(open_in_order(openers))
        return sessions
    device = DeviceContext().open() if _backend(target).on_gpu else None
    try:
        for name in target.variants:
            sessions[name] = open_graph(bundle, name, target, threads=threads, device=device)
    except BaseException:
        sessions.close()
        raise
    finally:
        if device is not None:
            device.close()  # the sessions keep it open
    return sessions


def open_graph(
    bundle: Bundle, name: str, target: ChosenBackend, *, threads: int | None = None, device: DeviceContext | None = None
) -> Session:
    """Open one graph of a bundle on a backend. Raises EngineError if the backend rejects it."""
    graph: GraphSpec = bundle.graph(name, target.variants[name])
    opened = _backend(target).open
    return opened(bundle, graph, threads) if device is None else opened(bundle, graph, threads, device)


def _backend(target: ChosenBackend) -> Backend:
    return next(b for b in BACKENDS if b.name == target.backend)
