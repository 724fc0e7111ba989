"""Routes of live sources."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from bridge_stg.evaluation.schema import WATCHED
from bridge_stg.server.http.document import component, stream_of
from bridge_stg.server.http.errors import ApiError, api_error
from bridge_stg.server.http.schemas import LiveSources, QueryText, problems
from bridge_stg.server.live.pictures import PICTURE_S, LivePictures
from bridge_stg.server.live.watch import Viewer
from bridge_stg.server.routes.videos import JPEG, TheService, frame_response
from bridge_stg.server.videos.stills import jpeg

WATCHING = problems(403, 404, 422, 429)
EVENTS = stream_of(
    {
        "update": component("Round"),
        "event": component("Event"),
        "end": {
            "type": "object",
            "properties": {"ended": {"enum": [*WATCHED["ended"]["enum"], "stopping"]}},
            "required": ["ended"],
        },
        "failed": component("Problem"),
    }
)
BOUNDARY = "frame"
MJPEG: dict[int | str, Any] = {200: {"content": {"multipart/x-mixed-replace": {}}}}

router = APIRouter(prefix="/v1/live", tags=["live"])


async def viewer_of(
    name: str, query: Annotated[list[QueryText], Query(min_length=1)], service: TheService
) -> AsyncIterator[Viewer]:
    """Watch a source until the answer has been sent."""
    service.check_queries(query)
    with service.live.viewer(name, query) as viewer:
        yield viewer


@router.get("")
async def sources(service: TheService) -> LiveSources:
    """List the live sources of the operator."""
    return LiveSources(live=service.live.sources())


@router.get("/{name}/events", response_class=EventSourceResponse, responses=EVENTS | WATCHING)
async def events(viewer: Annotated[Viewer, Depends(viewer_of)]) -> AsyncIterator[ServerSentEvent]:
    """Watch a source: `update` per round, `event` when a target appears, moves or leaves, `end` or `failed`."""
    async for event in viewer.events():
        yield event


@router.get("/{name}/video.mjpg", response_class=StreamingResponse, responses=MJPEG | WATCHING)
async def video(name: str, viewer: Annotated[Viewer, Depends(viewer_of)], service: TheService) -> Response:
    """Watch a source as Motion JPEG with the boxes of the queries, five pictures per second."""
    watch, pictures = service.live.watch(name), LivePictures(viewer.queries)

    def next_picture() -> bytes | None:
        return pictures.next(watch.newest.read(), watch.update)

    async def parts() -> AsyncIterator[bytes]:
        while not viewer.skip_events():
            if (picture := await service.in_thread(next_picture)) is not None:
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                yield head.encode() + picture + b"\r\n"
            await asyncio.sleep(PICTURE_S)
        yield f"--{BOUNDARY}--\r\n".encode()

    return StreamingResponse(parts(), media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}")


@router.get("/{name}/frame", response_class=Response, responses=JPEG | problems(404))
async def frame(name: str, service: TheService) -> Response:
    """Return the newest frame of a watched source as JPEG; X-Frame-Time is its time in the stream."""
    newest = service.live.watch(name).newest

    def read() -> tuple[bytes, float]:
        found = newest.read()
        if found is None:
            raise ApiError(404, "server.frame_not_found", "The source has not delivered a frame yet.")
        return jpeg(found[0]), found[1]

    try:
        return frame_response(await service.in_thread(read))
    except Exception as error:
        raise api_error(error) from error
