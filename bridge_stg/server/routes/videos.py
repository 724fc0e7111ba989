"""Routes of videos: upload, look, delete, play."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import ValidationError

from bridge_stg.server.http import schemas as models
from bridge_stg.server.http.errors import ApiError, api_error
from bridge_stg.server.http.multipart import Form, read_form
from bridge_stg.server.http.security import BODY_BYTES
from bridge_stg.server.service import Service
from bridge_stg.server.videos.stills import still
from bridge_stg.server.videos.uploads import Incoming, Upload

router = APIRouter(prefix="/v1/videos", tags=["videos"])

UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary", "description": "The video."}},
                }
            },
            "application/json": {"schema": models.VideoSource.model_json_schema()},
        },
    }
}


def service_of(request: Request) -> Service:
    """Return the service that the app was made with."""
    service: Service = request.app.state.service
    return service


async def read_upload(request: Request, service: Service, incoming: Incoming) -> Form:
    """Read a form whose file goes to `incoming`. Raises ApiError as `read_form` and `Incoming.write` do."""
    settings = service.settings
    return await read_form(
        request.stream(),
        request.headers.get("content-type", ""),
        incoming.write,
        within_s=settings.upload_s,
        idle_s=settings.idle_s,
    )


async def read_json(request: Request, model: Any) -> Any:
    """Read a body of JSON as a model. Raises ApiError: 408 if it is slow, 413 if it is long, 422 if it is not that."""
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > BODY_BYTES:
                raise ApiError(413, "body", f"The body is larger than {BODY_BYTES} bytes.")

    idle_s = service_of(request).settings.idle_s
    try:
        await asyncio.wait_for(read(), idle_s)
    except asyncio.TimeoutError:
        raise ApiError(408, "slow", f"The body took longer than {idle_s:g} s.") from None
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        raise ApiError(422, "invalid", invalid(error.errors())) from error


def invalid(errors: Any) -> str:
    """Return what is wrong with a body, in one paragraph."""
    said = [f"{'.'.join(map(str, error['loc'])) or 'the body'}: {error['msg']}" for error in list(errors)[:5]]
    return f"The request is not as /docs says: {'; '.join(said)}."


@router.post("", status_code=201, openapi_extra=UPLOAD_BODY)
async def upload(request: Request) -> models.Video:
    """Upload a video or picture, or name one of the server's media folder."""
    service = service_of(request)
    service.check_open()
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        named = await read_json(request, models.VideoSource)
        made = await service.store.refer(named.source)
    else:
        with service.store.receive() as incoming:
            form = await read_upload(request, service, incoming)
            made = await incoming.finish(form.filename)
    return models.Video(**made.to_json(service.settings.keep_s))


@router.get("/{video}")
async def about(request: Request, video: str) -> models.Video:
    """Say what a video is; it is kept for another while."""
    service = service_of(request)
    return models.Video(**service.store.get(video).to_json(service.settings.keep_s))


@router.delete("/{video}", status_code=204)
async def delete(request: Request, video: str) -> None:
    """Delete a video and all jobs about it."""
    service = service_of(request)
    service.remove_video(service.store.get(video))


@router.get("/{video}/content", response_class=FileResponse)
async def content(request: Request, video: str) -> FileResponse:
    """Return the file itself; a part of it where a Range is asked for."""
    found = service_of(request).store.get(video)
    return file_response(found.file.path, found.file.info.media_type, found.name)


@router.get("/{video}/frame", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
async def frame(request: Request, video: str, time: float = 0.0) -> Response:
    """Return the frame that is shown at a time as JPEG; the header X-Frame-Time holds its own time."""
    service = service_of(request)
    found: Upload = service.store.get(video)
    file = found.file
    if not 0 <= time <= 1e7:
        raise ApiError(422, "invalid", "The time is no number of seconds in the video.")
    service.store.hold(file)
    try:
        jpeg, at = await service.in_thread(still, file.path, file.info, time)
    except Exception as error:
        raise api_error(error, path=file.path, name=found.name) from error
    finally:
        service.store.release(file)
    return Response(jpeg, media_type="image/jpeg", headers={"X-Frame-Time": f"{at:.6f}"})


def file_response(path: str, media_type: str, name: str) -> FileResponse:
    """Return a file under its client's name, to be shown rather than saved."""
    return FileResponse(path, media_type=media_type, filename=name, content_disposition_type="inline")
