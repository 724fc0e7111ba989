"""Server-sent events: of a job, and of a live source. Every connection begins with how things stand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from bridge_stg.server.jobs.job import Job
from bridge_stg.server.jobs.scheduler import Scheduler

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = ": still here\n\n"


class EventStream(StreamingResponse):
    """A response of events; ends when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def event(name: str, data: Any, *, id: int | None = None) -> str:
    """Return one event as it is sent; `data` is JSON already if it is a string."""
    head = f"event: {name}\n" if id is None else f"id: {id}\nevent: {name}\n"
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


async def job_events(job: Job, scheduler: Scheduler) -> AsyncIterator[str]:
    """Yield a job's events until it has ended: queued, progress, then done, failed or cancelled."""
    told: str | None = None
    while True:
        version = job.version
        text = job_event(job, scheduler.position(job), version)
        body = text.partition("\n")[2]
        if body != told:
            told = body
            yield text
        if job.ended:
            return
        if not await job.changed(version, KEEP_ALIVE_S):
            yield KEEP_ALIVE


def job_event(job: Job, position: int | None, version: int) -> str:
    """Return the event that says how a job stands."""
    if job.status == "done":
        return event("done", job.to_text(), id=version)
    if job.status == "failed":
        assert job.refusal is not None
        return event("failed", job.refusal.to_json(), id=version)
    if job.status == "cancelled":
        return event("cancelled", {}, id=version)
    if job.status == "queued":
        return event("queued", {"position": position}, id=version)
    return event("progress", job.progress or {"stage": "start", "done": 0, "total": None}, id=version)
