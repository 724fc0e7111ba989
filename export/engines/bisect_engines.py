"""TensorRT engines of tapped graphs: what `verify --bisect` must have where a drift is an engine's.

They lie in the tapped graph's own folder and go with it. Runs on the device, so without torch and transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge_stg.export.engines.build import TIMING, build_engines
from bridge_stg.export.engines.build_plan import load_tensorrt
from bridge_stg.export.engines.compile import Report
from bridge_stg.export.engines.profiles import GraphProfiles
from bridge_stg.export.parity.bisect import Prepare, Side
from bridge_stg.runtime.backends.registry import gpu
from bridge_stg.runtime.backends.tensorrt.engine_cache import EngineDevice, EngineEntry, find_engine
from bridge_stg.runtime.bundle.bundle import ENGINES, Bundle
from bridge_stg.runtime.errors import EngineError

FAMILY_OF = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The backends that run nothing but engines, and the TensorRT of each."""


def engine_of(side: Side) -> EngineEntry | None:
    """Return the engine that a side's backend runs on this machine; None: the backend runs graphs as they are.

    Raises:
        EngineError: there is no engine, no TensorRT or no GPU.
    """
    family = FAMILY_OF.get(side.backend)
    if family is None:
        return None
    device = EngineDevice(family, str(load_tensorrt(family).__version__), gpu().sm)
    return find_engine(side.bundle, side.bundle.graph(side.graph, side.variant), device)


def build_like(
    engine: EngineEntry,
    tapped: Bundle,
    *,
    report: Report | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> EngineEntry:
    """Compile a tapped graph as the engine of the graph without taps was: same target, profiles and KV capacity.

    Args:
        engine: of the same graph without taps.
        tapped: what `taps.write_tapped` returned; the engine goes into its folder.
        report, say: as of `build_engines`.

    Raises:
        EngineError: TensorRT is another one now, refuses the taps, or memory does not suffice.
    """
    timing = Path(engine.folder).parent / TIMING
    if timing.is_file():  # what was learnt of kernels shortens this build; what this one learns goes with the taps
        place = tapped.path / ENGINES / engine.key.target / TIMING
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(timing, place)
    try:
        (entry,) = build_engines(
            tapped,
            [engine.target],
            graphs=[engine.graph],
            variant=engine.variant,
            family=engine.key.family,
            exactly={engine.graph: GraphProfiles(engine.profiles, engine.capacity)},
            report=report,
            say=say,
        )
    except EngineError as error:
        raise EngineError(
            f"it takes an engine of {engine.graph} ({engine.variant}) that gives out what its blocks hand on, and that "
            f"cannot be built: {error}"
        ) from error
    return entry


def engine_maker(*, report: Report | None = None, say: Callable[[str], Any] = lambda line: None) -> Prepare:
    """Return what makes the engine of a tapped graph for `bisect`, if the side's backend runs engines.

    Args:
        report: called with phase, step and steps of a compilation; may raise to stop.
        say: called with what a person should know, a line each.
    """

    def prepare(side: Side, tapped: Bundle) -> None:
        engine = engine_of(side)
        if engine is not None:
            build_like(engine, tapped, report=report, say=say)

    return prepare
