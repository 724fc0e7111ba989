"""The runtime: from a bundle, a video and a sentence to a tube. Needs no torch; importing it loads nothing heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge_stg.runtime.chain.opened_video import GroundedVideo as GroundedVideo
    from bridge_stg.runtime.chain.opened_video import OpenedVideo as OpenedVideo
    from bridge_stg.runtime.chain.results import FrameBoxes as FrameBoxes
    from bridge_stg.runtime.chain.results import Grounding as Grounding
    from bridge_stg.runtime.chain.results import Tube as Tube
    from bridge_stg.runtime.errors import BridgeError as BridgeError
    from bridge_stg.runtime.errors import BundleError as BundleError
    from bridge_stg.runtime.errors import CheckpointError as CheckpointError
    from bridge_stg.runtime.errors import EngineError as EngineError
    from bridge_stg.runtime.errors import Interrupted as Interrupted
    from bridge_stg.runtime.errors import QueryError as QueryError
    from bridge_stg.runtime.errors import VideoError as VideoError
    from bridge_stg.runtime.grounder import Grounder as Grounder
    from bridge_stg.runtime.heads.options import TextOptions as TextOptions
    from bridge_stg.runtime.live.events import Event as Event
    from bridge_stg.runtime.live.stats import LiveStats as LiveStats
    from bridge_stg.runtime.live.watch import LiveOptions as LiveOptions
    from bridge_stg.runtime.live.watch import LiveUpdate as LiveUpdate
    from bridge_stg.runtime.live.watch import LiveWatch as LiveWatch
    from bridge_stg.runtime.search.occurrences import SearchResult as SearchResult
    from bridge_stg.runtime.search.options import SearchOptions as SearchOptions

_MODULES = {
    "chain.opened_video": ("GroundedVideo", "OpenedVideo"),
    "chain.results": ("FrameBoxes", "Grounding", "Tube"),
    "errors": (
        "BridgeError", "BundleError", "CheckpointError", "EngineError", "Interrupted", "QueryError", "VideoError",
    ),
    "grounder": ("Grounder",),
    "heads.options": ("TextOptions",),
    "live.events": ("Event",),
    "live.stats": ("LiveStats",),
    "live.watch": ("LiveOptions", "LiveUpdate", "LiveWatch"),
    "search.occurrences": ("SearchResult",),
    "search.options": ("SearchOptions",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 – type checkers read the imports above instead


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it, on first access (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
