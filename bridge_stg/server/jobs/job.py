"""A job: queries about one video, from its arrival to its answer. Changed in the event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.videos.uploads import Upload

ENDED = ("done", "failed", "cancelled")
PROGRESS_EVERY_S = 0.1


def gone() -> ApiError:
    """Return the refusal of what is asked about a job that is not there."""
    return ApiError(404, "no_job", "There is no such job here (any more).")


class Job:
    """Queries about one video.

    Attributes:
        status: "queued", "running", "done", "failed" or "cancelled".
        over: set when nobody waits for the answer any more: work on it may stop.
        results: one grounding a query, when done; without their taps, which are in no JSON.
        results_text: the same as a JSON list, written by a worker: long ones would hold up the event loop.
        refusal: why it failed.
        progress: stage, done and total, as the runtime told them last.
        version: rises with every change.
        timer: ends it at its deadline.
    """

    def __init__(
        self, upload: Upload, queries: Sequence[str], *, task: str, allow_none: bool, deadline_s: float
    ) -> None:
        self.id = secrets.token_urlsafe(18)
        self.upload, self.queries, self.task, self.allow_none = upload, tuple(queries), task, allow_none
        self.deadline_s = deadline_s
        self.status = "queued"
        self.over = threading.Event()
        self.results: tuple[Grounding, ...] = ()
        self.results_text = "[]"
        self.refusal: ApiError | None = None
        self.progress: dict[str, Any] | None = None
        self.began, self.used = time.monotonic(), time.time()
        self.version = 0
        self.timer: asyncio.TimerHandle | None = None
        self._told = 0.0
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ENDED

    @property
    def nbytes(self) -> int:
        """What its results hold in memory, roughly."""
        boxes = [result.boxes for result in self.results if result.boxes is not None]
        return 2 * len(self.results_text) + sum(found.boxes.nbytes + 2 * found.times.nbytes for found in boxes)

    def to_text(self, position: int | None = None) -> str:
        """Return what the client is told as one line of JSON; `position` is its place among those that wait."""
        results = self.results_text if self.status == "done" else "null"
        return f'{json.dumps(self._head(position), ensure_ascii=False)[:-1]}, "results": {results}}}'

    def _head(self, position: int | None) -> dict[str, Any]:
        """Return all but the results."""
        value: dict[str, Any] = {
            "id": self.id,
            "video": self.upload.id,
            "queries": list(self.queries),
            "task": self.task,
            "status": self.status,
            "position": position,
            "progress": self.progress,
            "error": None,
            "code": None,
        }
        return value if self.refusal is None else {**value, **self.refusal.to_json()}

    def change(self, status: str) -> None:
        """Go on to another status. What has ended stays as it is."""
        if not self.ended:
            self.status = status
            self.notify()

    def tell(self, stage: str, done: float, total: float | None) -> None:
        """Take the runtime's progress; small steps of a stage are passed over."""
        now = time.monotonic()
        same = self.progress is not None and self.progress["stage"] == stage
        if self.ended or (same and now < self._told + PROGRESS_EVERY_S and done != total):
            return
        self._told = now
        self.progress = {"stage": stage, "done": round(done, 3), "total": None if total is None else round(total, 3)}
        self.notify()

    def notify(self) -> None:
        """Wake who waits for a change."""
        self.version += 1
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def changed(self, version: int, timeout_s: float | None = None) -> bool:
        """Wait until the job is newer than `version`; False if that took longer than `timeout_s`."""
        while self.version <= version:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await asyncio.wait_for(waiting, timeout_s)
            except asyncio.TimeoutError:
                return False
            finally:
                self._waiting.discard(waiting)
        return True

    async def end(self) -> None:
        """Wait until nothing more will happen."""
        while not self.ended:
            with contextlib.suppress(asyncio.TimeoutError):
                await self.changed(self.version)
