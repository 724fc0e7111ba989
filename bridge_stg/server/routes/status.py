"""Routes that say how the server is, and the page's files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from bridge_stg.server.http import schemas as models
from bridge_stg.server.http.docs_page import docs_page
from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.metrics import CONTENT_TYPE
from bridge_stg.server.routes.videos import service_of

PAGE = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".json": "application/json",
    ".webmanifest": "application/manifest+json",
}  # fmt: skip

router = APIRouter(tags=["status"])


@router.get("/health", responses={503: {"model": models.Health}})
async def health(request: Request) -> Response:
    """Say what this server is and how busy; 503 while it ends."""
    value = models.Health(**service_of(request).health())
    return JSONResponse(value.model_dump(), 200 if value.status == "ok" else 503)


@router.get("/health/live")
async def alive() -> dict[str, str]:
    """Answer as long as the process can."""
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return counters in the Prometheus text format."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE)


@router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Show the API to people, from its OpenAPI document."""
    return HTMLResponse(docs_page(request.app.openapi()))


@router.get("/", response_class=FileResponse, include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return page_file("index.html")


@router.get("/page/{name}", response_class=FileResponse, include_in_schema=False)
async def page_file_named(name: str) -> FileResponse:
    """Return a file of the page."""
    return page_file(name)


def page_file(name: str) -> FileResponse:
    """Return one of the files that lie in the page's folder now. Raises ApiError 404 for any other name."""
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in TYPES and path.is_file()}
    if name not in files:
        raise ApiError(404, "not_found", "There is no such page.")
    return FileResponse(files[name], media_type=TYPES[files[name].suffix])
