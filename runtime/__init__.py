"""The runtime: from a bundle, a video and a sentence to a tube. Needs no torch; importing it loads nothing heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge_stg.runtime.errors import (
        BridgeError,
        BundleError,
        CheckpointError,
        EngineError,
        Interrupted,
        QueryError,
        VideoError,
    )
    from bridge_stg.runtime.events import Event
    from bridge_stg.runtime.grounded_video import GroundedVideo
    from bridge_stg.runtime.grounder import Grounder
    from bridge_stg.runtime.live import LiveOptions, LiveUpdate, LiveWatch
    from bridge_stg.runtime.live_stats import LiveStats
    from bridge_stg.runtime.tubes import FrameBoxes, Grounding, Tube

_HOMES = {
    "BridgeError": "errors",
    "BundleError": "errors",
    "CheckpointError": "errors",
    "EngineError": "errors",
    "Event": "events",
    "FrameBoxes": "tubes",
    "GroundedVideo": "grounded_video",
    "Grounder": "grounder",
    "Grounding": "tubes",
    "Interrupted": "errors",
    "LiveOptions": "live",
    "LiveStats": "live_stats",
    "LiveUpdate": "live",
    "LiveWatch": "live",
    "QueryError": "errors",
    "Tube": "tubes",
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
    "QueryError",
    "Tube",
    "VideoError",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the file it lives in when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
