"""Routes of live sources."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from bridge_stg.server.http import schemas as models
from bridge_stg.server.http.errors import ApiError, api_error
from bridge_stg.server.jobs.events import EventStream
from bridge_stg.server.live.watch import live_events
from bridge_stg.server.routes.videos import service_of
from bridge_stg.server.videos.stills import jpeg

router = APIRouter(prefix="/v1/live", tags=["live"])


@router.get("")
async def sources(request: Request) -> models.LiveSources:
    """List the sources that the operator has named."""
    return models.LiveSources(**service_of(request).live.to_json())


@router.get("/{name}/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}})
async def events(request: Request, name: str, query: Annotated[list[str], Query(min_length=1)]) -> EventStream:
    """Watch a source: `update` for every round, `event` when a target appears, moves or leaves, `end` or `failed`."""
    service = service_of(request)
    service.check_queries(query)
    return EventStream(live_events(service.live, service.live.join(name, query)))


@router.get("/{name}/frame", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
async def frame(request: Request, name: str) -> Response:
    """Return the newest picture of a source that is watched, as JPEG; X-Frame-Time is its time in the stream."""
    service = service_of(request)
    looking = service.live.looking(name)

    def picture() -> tuple[bytes, float] | None:
        newest = looking.newest()
        return None if newest is None else (jpeg(newest[0]), newest[1])

    try:
        found = await service.in_thread(picture)
    except Exception as error:
        raise api_error(error) from error
    if found is None:
        raise ApiError(404, "no_picture", "The source has not given a picture yet.")
    return Response(found[0], media_type="image/jpeg", headers={"X-Frame-Time": f"{found[1]:.6f}"})
