"""Build the TensorRT engines of graphs with block outputs, for `verify --bisect` of a drift on a TensorRT backend.

The engines are in the changed graph's own folder and are deleted with it. Runs on the device, so it needs neither torch
nor transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge_stg.export.engines.build import TIMING, build_engines
from bridge_stg.export.engines.compile import Report
from bridge_stg.export.engines.profiles import GraphProfiles
from bridge_stg.export.engines.select_builds import load_tensorrt
from bridge_stg.export.parity.bisect import Prepare, Side
from bridge_stg.runtime.backends.registry import gpu
from bridge_stg.runtime.backends.tensorrt.engine_cache import EngineDevice, EngineEntry, find_engine
from bridge_stg.runtime.bundle.bundle import ENGINES, Bundle
from bridge_stg.runtime.errors import EngineError

FAMILY_OF = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backends that run engines only, and the TensorRT family of each."""


def build_like(
    engine: EngineEntry, exposed: Bundle, *, report: Report | None = None, say: Callable[[str], Any] = lambda line: None
) -> EngineEntry:
    """Compile a graph with block outputs for the same target, profiles and KV capacity as the engine of the graph.

    The new engine goes into the folder of `exposed`, the result of `block_outputs.expose_outputs`. Raises
    EngineError if TensorRT has another version now or cannot compile the graph, or memory is not sufficient.
    """
    timing = Path(engine.folder).parent / TIMING
    if timing.is_file():  # the kernel timings of the engine shorten this build; new ones are not added to it
        place = exposed.path / ENGINES / engine.key.target / TIMING
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(timing, place)
    try:
        (entry,) = build_engines(
            exposed,
            [engine.target],
            graphs=[engine.graph],
            variant=engine.variant,
            family=engine.key.family,
            exact_profiles={engine.graph: GraphProfiles(engine.profiles, engine.capacity)},
            report=report,
            say=say,
        )
    except EngineError as error:
        message = f"cannot build an engine of {engine.graph} ({engine.variant}) with block outputs to bisect: {error}"
        raise EngineError(error.code, message) from error
    return entry


def engine_maker(*, report: Report | None = None, say: Callable[[str], Any] = lambda line: None) -> Prepare:
    """Return the `prepare` of `bisect` that builds an engine where the side's backend runs engines.

    `report` and `say` as in `build_engines`.
    """

    def prepare(side: Side, exposed: Bundle) -> None:
        family = FAMILY_OF.get(side.backend)
        if family is None:  # the backend runs graphs directly
            return
        device = EngineDevice(family, str(load_tensorrt(family).__version__), gpu().sm)
        engine = find_engine(side.bundle, side.bundle.graph(side.graph, side.variant), device)
        build_like(engine, exposed, report=report, say=say)

    return prepare
