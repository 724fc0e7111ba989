"""The file of a running search: finished windows, so that a search that was stopped goes on where it was.

The first line identifies the search, each other line is a finished window and its CRC-32. Without one, no file is left.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.results import FrameBoxes, Grounding, Tube
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.files import LineFile
from bridge_stg.runtime.search.occurrences import is_seen
from bridge_stg.runtime.video.token_budget import CoarseChoice

SCHEMA = 3


@dataclass(frozen=True, eq=False)
class SearchWindow:
    """A finished window of a search."""

    shot_s: float  # start of its shot in seconds
    frame_times: np.ndarray  # float64 [N], times of its frames in seconds
    answers: Sequence[Sequence[Grounding]]  # all answers to each query
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds by stage


class SearchState:
    """The finished windows of one search, in order. A context manager; one process at a time.

    Args:
        path: the file, made if it does not exist; None: nothing is kept.
        identity: plain values of the search: video, queries, options, model.

    Attributes:
        windows: the finished windows.

    Raises:
        VideoError: the file is that of another search, or no state of a search.
        BridgeError: as `LineFile` does.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.windows: list[SearchWindow] = []
        self._file = None
        if path is None:
            return
        header = json.loads(json.dumps({"schema": SCHEMA, "search": dict(identity)}))
        self._file = LineFile(Path(path), in_use=f"{path} is in use by another search; wait for it")
        try:
            found, windows = self._file.read(header)
            if found != header:
                what = f"{path} is the state of another search (video, queries, options or model differ)"
                raise VideoError("search.other_state", f"{what}; delete it, or name another file")
            self.windows = [_window_from_json(row["window"]) for row in windows if _check(row)]
        except BaseException as error:
            self._file.close()
            if not isinstance(error, (ValueError, LookupError, TypeError)):
                raise
            what = f"{path} is damaged, or not the state of a search; delete it, or name another file"
            raise VideoError("search.other_state", what) from None

    def add(self, window: SearchWindow) -> None:
        """Append a finished window; it is on disk when this returns."""
        if self._file is not None:
            rows = [[_to_json(grounding) for grounding in found] for found in window.answers]
            times = np.round(window.frame_times, 9).tolist()
            values = {"shot_s": window.shot_s, "frame_times": times, "answers": rows}
            self._file.append({"crc32": _crc32(values), "window": values})

    def remove(self) -> None:
        """Delete the file of a search that is complete."""
        if self._file is not None:
            self._file.path.unlink(missing_ok=True)

    def __enter__(self) -> SearchState:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.__exit__(*exception)


def _crc32(values: Mapping[str, Any]) -> int:
    """Return the checksum of a window's plain values, which is the same after they were read from the file."""
    return zlib.crc32(json.dumps(values).encode())


def _check(row: Mapping[str, Any]) -> bool:
    """Return True; raise ValueError if the line of a window was changed."""
    if row["crc32"] != _crc32(row["window"]):
        raise ValueError("another checksum")
    return True


def _to_json(grounding: Grounding) -> dict[str, Any]:
    """Return a grounding as `Grounding.to_json` does; without its boxes if the target is not seen."""
    row = grounding.to_json()
    return row if is_seen(grounding) else {**row, "found": False, "span": None, "tube": None, "boxes": None}


def _window_from_json(window: Mapping[str, Any]) -> SearchWindow:
    answers = [[_from_json(row) for row in found] for found in window["answers"]]
    return SearchWindow(window["shot_s"], np.array(window["frame_times"], np.float64), answers)


def _from_json(row: Mapping[str, Any]) -> Grounding:
    """Return the grounding of a `to_json`, without the tapped states."""
    tube, boxes, coarse = row["tube"], row["boxes"], row["coarse"]
    same = ("query", "found", "answer", "heads", "mode", "decoding", "clock", "stream", "scores", "tokens", "task")
    return Grounding(
        **{name: row[name] for name in same},
        span=_span(row["span"]),
        named_span=_span(row["named_span"]),
        tube=None if tube is None else Tube(**_boxes(tube)),
        boxes=None if boxes is None else FrameBoxes(
            **_boxes(boxes), interpolated=np.array([one["interpolated"] for one in boxes], bool)
        ),
        size=_size(row["size"]),
        coarse=CoarseChoice.from_values({**coarse, "size": _size(coarse["size"])}),
        unknown_words=tuple(row["unknown_words"]),
        timings=row["timings_s"],
    )  # fmt: skip


def _span(span: Mapping[str, float] | None) -> tuple[float, float] | None:
    return None if span is None else (span["start_s"], span["end_s"])


def _size(size: Mapping[str, int]) -> tuple[int, int]:
    return size["width"], size["height"]


def _boxes(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {
        "times": np.array([row["time_s"] for row in rows], np.float64),
        "boxes": np.array([row["box"] for row in rows], np.float32).reshape(-1, 4),
        "presence": np.array([row["presence"] for row in rows], np.float32),
        "visible": np.array([row["visible"] for row in rows], bool),
    }
