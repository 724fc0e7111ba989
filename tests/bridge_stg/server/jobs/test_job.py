"""A job's events, without a server."""

from __future__ import annotations

import asyncio

from bridge_stg.server.http.schemas import NewJob
from bridge_stg.server.jobs.job import Job
from bridge_stg.server.videos.probe import FileInfo
from bridge_stg.server.videos.uploads import StoredFile, Upload


def test_a_job_that_ends_while_an_event_is_sent_still_sends_its_outcome() -> None:
    info = FileInfo("video", "video/mp4", 1.0, 64, 48, 8)
    upload = Upload("video", "a.mp4", StoredFile("key", "/a", 1, info, ours=False))

    async def follow() -> list[str | None]:
        job = Job(upload, NewJob(video="video", queries=["the car"]), 10)
        events = job.events(lambda job: 0)
        names = [(await anext(events)).event]
        job.change("done")  # before the next event is requested
        return [*names, *[event.event async for event in events]]

    assert asyncio.run(follow()) == ["queued", "done"]
