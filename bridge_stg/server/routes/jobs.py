"""Routes of jobs: create, follow, cancel; and the route that waits for its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from bridge_stg.server.http import schemas
from bridge_stg.server.http.document import component, form_or_json, stream_of
from bridge_stg.server.http.errors import ApiError, client_input
from bridge_stg.server.http.multipart import read_form
from bridge_stg.server.http.security import is_json
from bridge_stg.server.jobs.job import Job
from bridge_stg.server.routes.videos import TakesJson, TheService, file_response
from bridge_stg.server.service import Service
from bridge_stg.server.videos.uploads import Upload

OPTIONS = ("task", "first_box", "allow_none", "stream", "deadline_s")
"""Fields of a form beside `file` and `queries`."""

router = APIRouter(prefix="/v1", tags=["jobs"])

T = TypeVar("T")

problems = schemas.problems
EVENTS = stream_of(
    {
        **{name: component(name.capitalize()) for name in ("queued", "progress")},
        "done": component("Job"),
        "failed": component("Problem"),
        "cancelled": {"type": "object", "maxProperties": 0},
    }
)
MP4: dict[int | str, Any] = {
    200: {"content": {"video/mp4": {}}},
    206: {"description": "The range.", "content": {"video/mp4": {}, "multipart/byteranges": {}}},
}


async def job_of(job: str, service: TheService) -> Job:
    """Return the job that the path names. Raises ApiError 404 or 410."""
    return service.job(job)


TheJob = Annotated[Job, Depends(job_of)]


@router.post(
    "/jobs",
    status_code=202,
    response_model=schemas.Job,
    responses=problems(*schemas.WRITING, 404, 422, 429),
    dependencies=[TakesJson],
)
async def create(service: TheService, new: schemas.NewJob) -> Response:
    """Send queries about a video. The answer comes later: see `GET /v1/jobs/{id}` and its events."""
    return _job_response(service, service.add_job(service.store.get(new.video), new), status=202)


@router.get("/jobs/{job}", response_model=schemas.Job, responses=problems(404, 410))
async def describe(found: TheJob, service: TheService) -> Response:
    """Return the status of a job, with its results when it is done."""
    return _job_response(service, found)


@router.delete("/jobs/{job}", status_code=204, responses=problems(*schemas.WRITING, 404, 410))
async def cancel(found: TheJob, service: TheService) -> None:
    """Cancel a job, and delete its answer."""
    service.forget(found)


@router.get("/jobs/{job}/events", response_class=EventSourceResponse, responses=EVENTS | problems(403, 404, 410))
async def events(found: TheJob, service: TheService) -> AsyncIterator[ServerSentEvent]:
    """Follow a job: the present state first, then `queued`, `progress`, and `done`, `failed` or `cancelled`."""
    async for event in found.events(service.scheduler.position):
        yield event


@router.get(
    "/jobs/{job}/annotated.mp4",
    response_class=FileResponse,
    responses=MP4 | problems(404, 408, 409, 410, 416, 422, 429),
)
async def annotated(request: Request, found: TheJob, service: TheService) -> Response:
    """Return the video with all answers drawn in, rendered at the first request."""
    if found.status != "done":
        message = f"The job is {found.status}; its answers can be drawn when it is done."
        raise ApiError(409, "server.job_not_done", message)
    service.store.hold(found.upload.file)
    try:
        path = await while_connected(request.receive, service.renderer.file(found))
    finally:
        service.store.release(found.upload.file)
    return file_response(str(path), "video/mp4", f"{found.upload.name.rpartition('.')[0] or 'video'}-annotated.mp4")


@router.post(
    "/ground",
    response_model=schemas.Grounded,
    responses=problems(*schemas.QUERYING),
    openapi_extra=form_or_json(schemas.NewJob, "video"),
)
async def ground(request: Request, service: TheService) -> Response:
    """Upload a video, send queries, and wait for the answers. Closing the connection cancels; nothing is kept."""
    service.check_open()
    if is_json(request.headers):
        body = await request.body()
        with client_input():
            new = schemas.NewJob.model_validate_json(body)
        return await _answer(request, service, service.store.get(new.video), new)
    service.scheduler.check_room()
    with service.store.receive() as incoming:
        form = await read_form(request, service.settings, incoming.write, fields=("queries", *OPTIONS))
        options = form.options(without="queries")
        with client_input():
            new = schemas.NewJob.model_validate({"video": "", "queries": form.values("queries"), **options})
        service.check_queries(new.queries)
        upload = await service.store.finish(incoming, form.filename)
    try:
        return await _answer(request, service, upload, new)
    finally:
        service.remove_video(upload)


def _job_response(service: Service, job: Job, *, status: int = 200) -> Response:
    """Return a job without the check against its schema, which is slow for long results."""
    return Response(job.to_text(service.scheduler.position(job)), status, media_type="application/json")


async def _answer(request: Request, service: Service, upload: Upload, new: schemas.NewJob) -> Response:
    """Run a job and return its answers; it is deleted afterwards."""
    job = service.add_job(upload, new)
    try:
        await while_connected(request.receive, job.end())
        job.check_done()
        video = json.dumps(service.store.describe(upload).model_dump(), ensure_ascii=False)
        return Response(f'{{"video": {video}, "results": {job.results_text}}}', media_type="application/json")
    finally:
        service.forget(job)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Wait for `work` as long as the client is connected. Raises ClientDisconnect."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
