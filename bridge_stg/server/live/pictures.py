"""Frames of a watched source as JPEGs with the boxes of some queries, for clients that only show pictures."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.live.watch import LiveUpdate
from bridge_stg.runtime.visualize.painter import FramePainter
from bridge_stg.server.videos.stills import jpeg

PICTURE_S = 0.2
"""Seconds between two pictures."""
MOST_WAITING = 50  # frames that wait for their answers, as JPEGs
CATCH_UP_S = 0.01  # by how much the delay shrinks per picture while it is longer than necessary


class LivePictures:
    """The pictures of one client. Frames are delayed until their boxes are known: targets move on in the meantime."""

    def __init__(self, queries: Sequence[str]) -> None:
        self._queries = queries
        self._waiting: deque[tuple[float, bytes]] = deque(maxlen=MOST_WAITING)
        self._newest_s = -np.inf
        self._lag_s = 0.0

    def next(self, newest: tuple[np.ndarray, float] | None, update: LiveUpdate | None) -> bytes | None:
        """Add the newest frame, RGB uint8 [H, W, 3] and its time; return the picture to show now, None for no new one.

        `update` is the newest round of the source.
        """
        if newest is not None and newest[1] > self._newest_s:
            self._newest_s = newest[1]
            self._waiting.append((newest[1], jpeg(newest[0])))
        if update is None:
            return None
        self._lag_s = max(self._newest_s - update.known_s, self._lag_s - CATCH_UP_S)
        due = None
        while self._waiting:
            time_s = self._waiting[0][0]
            known = time_s < update.known_s and time_s <= self._newest_s - self._lag_s
            if not known and len(self._waiting) < MOST_WAITING:
                break
            due = self._waiting.popleft()
        return None if due is None else self._drawn(due[1], due[0], update)

    def _drawn(self, picture: bytes, time_s: float, update: LiveUpdate) -> bytes:
        from PIL import Image

        answers = {grounding.query: grounding for grounding in update.groundings}
        shown = [_at(answers[query], time_s) for query in self._queries if query in answers]
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        FramePainter(shown, image.size, None).paint(image, time_s)
        return jpeg(np.asarray(image))


def _at(grounding: Grounding, time_s: float) -> Grounding:
    """Return a grounding with the box of one time only; without one if the target is not there at that time."""
    span, tube = grounding.span, grounding.tube
    there = span is not None and tube is not None and span[0] <= time_s < span[1]
    return replace(grounding, found=there, boxes=tube.at(np.array([time_s])) if there and tube is not None else None)
