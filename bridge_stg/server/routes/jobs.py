"""Routes of jobs: ask, look, follow, cancel; and the one that waits for its answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from bridge_stg.server.http import schemas as models
from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.jobs import job as jobs
from bridge_stg.server.jobs.events import EventStream, job_events
from bridge_stg.server.routes.videos import file_response, read_json, read_upload, service_of
from bridge_stg.server.service import Service
from bridge_stg.server.videos.uploads import Upload

router = APIRouter(prefix="/v1", tags=["jobs"])

WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
GROUND_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "queries"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "The video."},
                        "queries": {
                            "type": "array",
                            "items": {"type": "string"},
                            "description": "What to find; repeat the field for several.",
                        },
                        "task": {"type": "string", "enum": ["ground", "span"], "default": "ground"},
                        "allow_none": {"type": "boolean", "default": True},
                        "deadline_s": {"type": "number", "exclusiveMinimum": 0},
                    },
                }
            },
            "application/json": {"schema": models.NewJob.model_json_schema()},
        },
    }
}


@router.post("/jobs", status_code=202, response_model=models.Job)
async def ask(request: Request, asked: models.NewJob) -> Response:
    """Ask queries about a video. The answer comes later: see `GET /v1/jobs/{id}` and its events."""
    service = service_of(request)
    return shown(service, _add(service, service.store.get(asked.video), asked), status=202)


@router.get("/jobs/{job}", response_model=models.Job)
async def about(request: Request, job: str) -> Response:
    """Say how a job stands, with its results when it is done."""
    service = service_of(request)
    return shown(service, service.job(job))


@router.delete("/jobs/{job}", status_code=204)
async def cancel(request: Request, job: str) -> None:
    """Give a job up, and forget its answer."""
    service = service_of(request)
    service.forget(service.job(job))


@router.get(
    "/jobs/{job}/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}}
)
async def events(request: Request, job: str) -> EventStream:
    """Follow a job: `queued`, `progress`, then `done`, `failed` or `cancelled`; a connection begins with the state."""
    service = service_of(request)
    return EventStream(job_events(service.job(job), service.scheduler))


@router.get("/jobs/{job}/annotated.mp4", response_class=FileResponse)
async def annotated(request: Request, job: str) -> FileResponse:
    """Return the video with all answers drawn in; it is made when it is first asked for."""
    service = service_of(request)
    found = service.job(job)
    if found.status != "done":
        raise ApiError(409, "not_done", f"The job is {found.status}; there is something to draw when it is done.")
    service.store.hold(found.upload.file)
    try:
        path = await _unless_gone(request.receive, service.renderer.file(found))
    finally:
        service.store.release(found.upload.file)
    return file_response(str(path), "video/mp4", f"{found.upload.name.rpartition('.')[0] or 'video'}-annotated.mp4")


@router.post("/ground", response_model=models.Grounded, openapi_extra=GROUND_BODY)
async def ground(request: Request) -> Response:
    """Upload a video, ask, and wait for the answers. Who goes away gives the work up; nothing is kept."""
    service = service_of(request)
    service.check_open()
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        asked = await read_json(request, models.NewJob)
        upload = service.store.get(asked.video)
        return await _answered(request, service, upload, asked)
    service.scheduler.check_room()
    with service.store.receive() as incoming:
        form = await read_upload(request, service, incoming)
        asked = _asked(form)
        service.check_queries(asked.queries)
        upload = await incoming.finish(form.filename)
    try:
        return await _answered(request, service, upload, asked)
    finally:
        service.remove_video(upload)


def shown(service: Service, job: jobs.Job, *, status: int = 200) -> Response:
    """Return a job as clients see it."""
    return json_text(job.to_text(service.scheduler.position(job)), status=status)


def json_text(text: str, *, status: int = 200) -> Response:
    """Return JSON that is written already; it is not checked against its model, which long results would make slow."""
    return Response(text, status, media_type="application/json")


def _add(service: Service, upload: Upload, asked: models.NewJob) -> jobs.Job:
    return service.add_job(
        upload, asked.queries, task=asked.task, allow_none=asked.allow_none, deadline_s=asked.deadline_s
    )


async def _answered(request: Request, service: Service, upload: Upload, asked: models.NewJob) -> Response:
    job = _add(service, upload, asked)
    try:
        await _unless_gone(request.receive, job.end())
        if job.refusal is not None:
            raise job.refusal
        if job.status != "done":
            raise ApiError(409, "cancelled", "The job was cancelled.")
        video = json.dumps(upload.to_json(service.settings.keep_s), ensure_ascii=False)
        return json_text(f'{{"video": {video}, "results": {job.results_text}}}')
    finally:
        service.forget(job)


async def _unless_gone(receive: Receive, work: Any) -> Any:
    """Wait for something as long as the client does. Raises ClientDisconnect when it goes."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    waiting, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        waiting.cancel()
        leaving.cancel()


def _asked(form: Any) -> models.NewJob:
    """Read the fields of a form. Raises ApiError 422."""
    allow = form.value("allow_none")
    task, deadline = form.value("task") or "ground", form.value("deadline_s")
    try:
        deadline_s = None if deadline is None else float(deadline)
        if task not in ("ground", "span") or (allow is not None and allow.lower() not in WORDS):
            raise ValueError
        if deadline_s is not None and not 0 < deadline_s < 1e9:
            raise ValueError
    except ValueError:
        raise ApiError(
            422,
            "invalid",
            "A field is not as /docs says: task is ground or span, allow_none true or false, deadline_s seconds.",
        ) from None
    return models.NewJob.model_construct(
        video="",
        queries=form.values("queries"),
        task=task,
        allow_none=True if allow is None else WORDS[allow.lower()],
        deadline_s=deadline_s,
    )
