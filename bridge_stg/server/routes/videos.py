"""Routes of videos: upload, describe, delete, play. Also the dependencies and body parsers that all routes share."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from bridge_stg.server.http.document import form_or_json, link
from bridge_stg.server.http.errors import ApiError, api_error, client_input
from bridge_stg.server.http.multipart import read_form
from bridge_stg.server.http.schemas import WRITING, Video, VideoSource, problems
from bridge_stg.server.http.security import is_json
from bridge_stg.server.service import Service
from bridge_stg.server.videos.uploads import Upload

router = APIRouter(prefix="/v1/videos", tags=["videos"])

FILE: dict[int | str, Any] = {
    200: {"content": {"video/*": {}, "image/*": {}}},
    206: {"description": "The range.", "content": {"video/*": {}, "image/*": {}, "multipart/byteranges": {}}},
}
ASKING: dict[int | str, Any] = {
    201: {"links": {"ask": link("/v1/jobs", video="id"), "wait": link("/v1/ground", video="id")}}
}
JPEG: dict[int | str, Any] = {
    200: {"content": {"image/jpeg": {}}, "headers": {"X-Frame-Time": {"schema": {"type": "number"}}}}
}


async def service_of(request: Request) -> Service:
    """Return the service of the application."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]


async def check_json(request: Request) -> None:
    """Raise ApiError 415 if a body is not JSON."""
    if not is_json(request.headers):
        raise ApiError(415, "server.unsupported_content_type", "Send the body as JSON, with its Content-Type.")


TakesJson = Depends(check_json)


async def upload_of(video: str, service: TheService) -> Upload:
    """Return the upload that the path names. Raises ApiError 404."""
    return service.store.get(video)


TheUpload = Annotated[Upload, Depends(upload_of)]


class RangedFile(FileResponse):
    """A file, or the part of it that a Range header requests. Raises ApiError for a Range that it cannot answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                raise _range_error(message["status"], Headers(raw=message["headers"]))
            await send(message)

        await super().__call__(scope, receive, sending)


def _range_error(status: int, headers: Headers) -> ApiError:
    if status == 400:
        return ApiError(400, "server.bad_range", "The Range header is invalid; expected, for example, `bytes=0-999`.")
    error = ApiError(416, "server.range_outside_file", "The Range header asks for bytes that the file does not have.")
    error.headers = {"Content-Range": headers["content-range"]}
    return error


def file_response(path: str, media_type: str, name: str) -> RangedFile:
    """Return a file under its client's name, for display rather than download."""
    return RangedFile(path, media_type=media_type, filename=name, content_disposition_type="inline")


@router.post(
    "",
    status_code=201,
    responses=ASKING | problems(*WRITING, 404, 422),
    openapi_extra=form_or_json(VideoSource, "source"),
)
async def upload(request: Request, service: TheService) -> Video:
    """Upload a video or image, or name a file of the server's media folder."""
    service.check_open()
    if is_json(request.headers):
        body = await request.body()
        with client_input():
            named = VideoSource.model_validate_json(body)
        return service.store.describe(await service.store.refer(named.source))
    with service.store.receive() as incoming:
        form = await read_form(request, service.settings, incoming.write, fields=())
        return service.store.describe(await service.store.finish(incoming, form.filename))


@router.get("/{video}", responses=problems(404))
async def describe(found: TheUpload, service: TheService) -> Video:
    """Describe a video, and extend its expiry time."""
    return service.store.describe(found)


@router.delete("/{video}", status_code=204, responses=problems(*WRITING, 404))
async def delete(found: TheUpload, service: TheService) -> None:
    """Delete a video and all jobs about it."""
    service.remove_video(found)


@router.get("/{video}/content", response_class=FileResponse, responses=FILE | problems(404, 416))
async def content(found: TheUpload) -> RangedFile:
    """Return the file itself, or the part of it that a Range header requests."""
    return file_response(found.file.media.path, found.file.info.media_type, found.name)


@router.get("/{video}/frame", response_class=Response, responses=JPEG | problems(404, 408, 422))
async def frame(
    found: TheUpload,
    service: TheService,
    time: Annotated[float, Query(ge=0, le=1e7)] = 0.0,
    stream: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """Return the frame that is displayed at a time as JPEG; the header X-Frame-Time has its own time."""
    file = found.file
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
