"""A job: queries about one video, from its arrival to its answer. Changed in the event loop only."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass
from typing import Any

from fastapi.sse import ServerSentEvent

from bridge_stg.runtime.chain.opened_video import ChatMessage
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.http.schemas import NewJob
from bridge_stg.server.videos.uploads import Upload

ENDED = ("done", "failed", "cancelled")


def job_not_found(why: str | None = None) -> ApiError:
    """Return the error for a job that does not exist, or that the server deleted because of `why`."""
    if why is not None:
        return ApiError(410, "server.job_deleted", f"This job was deleted: {why}. Send it again.")
    return ApiError(404, "server.job_not_found", "This job does not exist or has expired.")


class Job:
    """Queries about one video: queued, running, then done, failed or cancelled."""

    def __init__(self, upload: Upload, new: NewJob, deadline_s: float) -> None:
        self.id = secrets.token_urlsafe(18)
        self.upload, self.queries, self.task, self.stream = upload, tuple(new.queries), new.task, new.stream
        self.runtime_task = new.runtime_task
        self.deadline_s = deadline_s
        self.status = "queued"
        self.over = threading.Event()  # set when no client waits for the answer: its work may stop
        self.results: tuple[Grounding, ...] = ()  # without tapped states, which are not part of the JSON
        self.results_text = "[]"  # serialized by a worker because long results would block the event loop
        self.error: ApiError | None = None
        self.progress: dict[str, Any] | None = None  # the newest stage, done and total of the runtime
        self.began, self.used = time.monotonic(), time.time()
        self.version = 0  # number of changes
        self.timer: asyncio.TimerHandle | None = None  # ends the job at its deadline
        self._news = asyncio.Event()

    @property
    def batch_key(self) -> Hashable:
        """Key of the batch: jobs with equal keys are answered together."""
        return self.upload.file, self.stream, self.runtime_task

    @property
    def ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self.status in ENDED

    @property
    def nbytes(self) -> int:
        """Approximate memory of the results in bytes."""
        boxes = [result.boxes for result in self.results if result.boxes is not None]
        return 2 * len(self.results_text) + sum(found.boxes.nbytes + 2 * found.times.nbytes for found in boxes)

    def to_text(self, position: int | None = None) -> str:
        """Return the job as one line of JSON; `position` is its place in the queue."""
        value = {
            "id": self.id,
            "video": self.upload.id,
            "queries": self.queries,
            "task": self.task,
            "first_box": self.runtime_task.first_box,
            "allow_none": self.runtime_task.allow_none,
            "stream": self.stream,
            "status": self.status,
            "position": position,
            "progress": self.progress,
            **({"error": None, "code": None} if self.error is None else self.error.to_json()),
        }
        results = self.results_text if self.status == "done" else "null"
        return f'{json.dumps(value, ensure_ascii=False)[:-1]}, "results": {results}}}'

    def change(self, status: str) -> None:
        """Set the status, unless the job has ended."""
        if not self.ended:
            self.status = status
            self.notify()

    def report(self, stage: str, done: float, total: float | None) -> None:
        """Set the progress, unless the job has ended."""
        if not self.ended:
            total = None if total is None else round(total, 3)
            self.progress = {"stage": stage, "done": round(done, 3), "total": total}
            self.notify()

    def notify(self) -> None:
        """Wake up everything that waits for a change."""
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()

    async def events(self, position: Callable[[Job], int | None]) -> AsyncIterator[ServerSentEvent]:
        """Yield the present state and every later one: queued, progress, then done, failed or cancelled."""
        last: ServerSentEvent | None = None
        while True:
            version, ended, event = self.version, self.ended, self._event(position(self))
            if event != last:
                last = event
                yield event.model_copy(update={"id": str(version)})
            if ended:  # as of this event: the job may have ended while it was sent
                return
            while self.version <= version:
                await self._news.wait()

    def _event(self, position: int | None) -> ServerSentEvent:
        if self.status == "done":
            return ServerSentEvent(event="done", raw_data=self.to_text())
        if self.status == "running":
            return ServerSentEvent(event="progress", data=self.progress or {"stage": "start", "done": 0, "total": None})
        data = {"position": position} if self.status == "queued" else {} if self.error is None else self.error.to_json()
        return ServerSentEvent(event=self.status, data=data)

    async def end(self) -> None:
        """Wait until the job has ended."""
        while not self.ended:
            await self._news.wait()

    def check_done(self) -> None:
        """Raise the ApiError of a job that has ended without results."""
        if self.error is not None:
            raise self.error
        if self.status != "done":
            raise ApiError(409, "call.cancelled", "The job was cancelled.")


@dataclass(frozen=True)
class Question:
    """A question about a video, and the messages of the chat before it; see `Grounder.ask`."""

    text: str
    context: tuple[ChatMessage, ...]
    history: tuple[ChatMessage, ...]
    max_tokens: int


class Chat(Job):
    """A question about one video, whose answer in text arrives in pieces.

    Attributes:
        question: the question.
        usage: counts of tokens, once the answer is complete: `prompt_tokens`, `completion_tokens`, `total_tokens`.
        finish_reason: why the answer ended: `stop`, or `length` for `max_tokens`.
    """

    def __init__(self, upload: Upload, question: Question, deadline_s: float) -> None:
        super().__init__(upload, NewJob.model_validate({"video": upload.id, "queries": [question.text]}), deadline_s)
        self.question = question
        self.usage: dict[str, int] = {}
        self.finish_reason = "stop"
        self._pieces: list[str] = []

    @property
    def batch_key(self) -> Hashable:
        """A chat shares its batch with no other job."""
        return self.id

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._pieces)

    def add(self, piece: str) -> None:
        """Append a piece of the answer."""
        self._pieces.append(piece)
        self.notify()

    async def begin(self) -> None:
        """Wait for the first piece of the answer. Raises ApiError as `check_done` if the job fails before it."""
        while not self._pieces and not self.ended:
            await self._news.wait()
        if self.ended:
            self.check_done()

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the pieces of the answer as they arrive. Raises ApiError as `check_done` if the job fails."""
        sent = 0
        while True:
            for piece in self._pieces[sent:]:
                sent += 1
                yield piece
            if sent == len(self._pieces):
                if self.ended:
                    self.check_done()
                    return
                await self._news.wait()
