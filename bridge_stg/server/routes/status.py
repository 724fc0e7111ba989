"""Routes of the server's state, of the API's documentation, and of the page's files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from prometheus_client.exposition import CONTENT_TYPE_LATEST

import bridge_stg
from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.http.schemas import Health, Queue, Sample
from bridge_stg.server.routes.videos import RangedFile, TheService

PAGE = Path(__file__).parents[1] / "page"
TEMPLATES = Environment(loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined)
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SHOWN_LIMITS = ("upload_bytes", "duration_s", "pixels", "queries", "query_chars", "seconds")

router = APIRouter(tags=["status"])


@router.get("/health", responses={503: {"model": Health}})
async def health(service: TheService) -> Response:
    """Return the state and the load of this server; 503 while it shuts down."""
    settings, jobs, target = service.settings, service.scheduler, service.grounder.target
    spec = service.grounder.spec
    value = Health(
        status="stopping" if service.stopping else "ok",
        version=bridge_stg.__version__,
        bundle=service.bundle,
        backend="unknown" if target is None else target.summary,
        verified=service.grounder.verified,
        trained=spec.is_trained(service.grounder.heads),
        knows=spec.knows.summary if spec.knows else None,
        sample=None if settings.sample is None else Sample(name=settings.sample.name, query=_query(settings.sample)),
        queue=Queue(waiting=jobs.waiting, running=jobs.running, most_waiting=settings.max_queue),
        limits={name: getattr(settings, f"max_{name}") for name in SHOWN_LIMITS},
    )
    return JSONResponse(value.model_dump(), 503 if service.stopping else 200)


def _query(sample: Path) -> str | None:
    """Return the first line of the text file beside a sample; None if there is none."""
    try:
        lines = sample.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return lines[0].strip() or None if lines else None


@router.get("/v1/sample", response_class=FileResponse, include_in_schema=False)
async def sample(service: TheService) -> FileResponse:
    """Return the video to try. Raises ApiError 404 if there is none."""
    path = service.settings.sample
    if path is None or not path.is_file():
        raise ApiError(404, "server.not_found", "This server has no sample.")
    return RangedFile(path, filename=path.name)


@router.get("/health/live")
async def alive() -> dict[str, str]:
    """Respond as long as the process is alive."""
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: TheService) -> Response:
    """Return the metrics in the Prometheus text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Return the API's documentation as a page without scripts and without network access."""
    return HTMLResponse(TEMPLATES.get_template("docs.html.j2").render(openapi=request.app.openapi()))


@router.get("/", response_class=FileResponse, include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return await page_file("index.html")


@router.get("/page/{name}", response_class=FileResponse, include_in_schema=False)
async def page_file(name: str) -> FileResponse:
    """Return a file of the page's folder. Raises ApiError 404 for any other name."""
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in TYPES and path.is_file()}
    if name not in files:
        raise ApiError(404, "server.not_found", "This page does not exist.")
    return RangedFile(files[name], media_type=TYPES[files[name].suffix])
