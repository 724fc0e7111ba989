"""The runtime: from a bundle, a video and a sentence to a tube. Needs no torch; importing it loads nothing heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge_stg.runtime.chain.opened_video import GroundedVideo, OpenedVideo
    from bridge_stg.runtime.chain.results import FrameBoxes, Grounding, Tube
    from bridge_stg.runtime.errors import (
        BridgeError,
        BundleError,
        CheckpointError,
        EngineError,
        Interrupted,
        QueryError,
        VideoError,
    )
    from bridge_stg.runtime.grounder import Grounder
    from bridge_stg.runtime.live.events import Event
    from bridge_stg.runtime.live.stats import LiveStats
    from bridge_stg.runtime.live.watch import LiveOptions, LiveUpdate, LiveWatch

_HOMES = {
    "BridgeError": "errors",
    "BundleError": "errors",
    "CheckpointError": "errors",
    "EngineError": "errors",
    "Event": "live.events",
    "FrameBoxes": "chain.results",
    "GroundedVideo": "chain.opened_video",
    "Grounder": "grounder",
    "Grounding": "chain.results",
    "Interrupted": "errors",
    "LiveOptions": "live.watch",
    "LiveStats": "live.stats",
    "LiveUpdate": "live.watch",
    "LiveWatch": "live.watch",
    "OpenedVideo": "chain.opened_video",
    "QueryError": "errors",
    "Tube": "chain.results",
    "VideoError": "errors",
}

__all__ = [
    "BridgeError",
    "BundleError",
    "CheckpointError",
    "EngineError",
    "Event",
    "FrameBoxes",
    "GroundedVideo",
    "Grounder",
    "Grounding",
    "Interrupted",
    "LiveOptions",
    "LiveStats",
    "LiveUpdate",
    "LiveWatch",
    "OpenedVideo",
    "QueryError",
    "Tube",
    "VideoError",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it, on first access (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
