"""Routes of videos: upload, describe, delete, play. Also the dependencies and body parsers that all routes share."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel

from bridge_stg.server.http.errors import ApiError, api_error, client_input
from bridge_stg.server.http.multipart import read_form
from bridge_stg.server.http.schemas import Video, VideoSource
from bridge_stg.server.http.security import is_json
from bridge_stg.server.service import Service
from bridge_stg.server.videos.uploads import Upload

router = APIRouter(prefix="/v1/videos", tags=["videos"])

FILE = {"type": "string", "format": "binary", "description": "The video."}
JPEG: dict[int | str, Any] = {200: {"content": {"image/jpeg": {}}}}


def form_or_json(model: type[BaseModel], name: str) -> dict[str, Any]:
    """Return the OpenAPI description of a JSON body, or of a form with a file instead of the field `name`."""
    schema = model.model_json_schema()
    fields = {key: value for key, value in schema["properties"].items() if key != name}
    required = ["file", *(key for key in schema["required"] if key != name)]
    form = {"type": "object", "required": required, "properties": {"file": FILE, **fields}}
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


async def service_of(request: Request) -> Service:
    """Return the service of the application."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]


async def upload_of(video: str, service: TheService) -> Upload:
    """Return the upload that the path names. Raises ApiError 404."""
    return service.store.get(video)


TheUpload = Annotated[Upload, Depends(upload_of)]


def file_response(path: str, media_type: str, name: str) -> FileResponse:
    """Return a file under its client's name, for display rather than download."""
    return FileResponse(path, media_type=media_type, filename=name, content_disposition_type="inline")


@router.post("", status_code=201, openapi_extra=form_or_json(VideoSource, "source"))
async def upload(request: Request, service: TheService) -> Video:
    """Upload a video or image, or name a file of the server's media folder."""
    service.check_open()
    if is_json(request.headers):
        body = await request.body()
        with client_input():
            named = VideoSource.model_validate_json(body)
        return service.store.describe(await service.store.refer(named.source))
    with service.store.receive() as incoming:
        form = await read_form(request, service.settings, incoming.write)
        return service.store.describe(await service.store.finish(incoming, form.filename))


@router.get("/{video}")
async def describe(found: TheUpload, service: TheService) -> Video:
    """Describe a video, and extend its expiry time."""
    return service.store.describe(found)


@router.delete("/{video}", status_code=204)
async def delete(found: TheUpload, service: TheService) -> None:
    """Delete a video and all jobs about it."""
    service.remove_video(found)


@router.get("/{video}/content", response_class=FileResponse)
async def content(found: TheUpload) -> FileResponse:
    """Return the file itself, or the part of it that a Range header requests."""
    return file_response(found.file.media.path, found.file.info.media_type, found.name)


@router.get("/{video}/frame", response_class=Response, responses=JPEG)
async def frame(found: TheUpload, service: TheService, time: float = 0.0, stream: int | None = None) -> Response:
    """Return the frame that is displayed at a time as JPEG; the header X-Frame-Time has its own time."""
    file = found.file
    if not 0 <= time <= 1e7:
        raise ApiError(422, "server.invalid_request", f"time={time}: expected seconds from the start of the video.")
    service.store.hold(file)
    try:
        media = replace(file.media, stream=stream)
        return frame_response(await service.in_thread(media.still, file.info, time))
    except Exception as error:
        raise api_error(error, path=file.media.path, name=found.name) from error
    finally:
        service.store.release(file)


def frame_response(frame: tuple[bytes, float]) -> Response:
    """Return a JPEG and its time in seconds."""
    return Response(frame[0], media_type="image/jpeg", headers={"X-Frame-Time": f"{frame[1]:.6f}"})
