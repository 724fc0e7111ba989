"""Draw the answers of a job into its video, one colour per query. Rendered once per job, in a thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.visualize.annotate import encode_h264, paint_frames
from bridge_stg.runtime.visualize.painter import FramePainter
from bridge_stg.server.http.errors import api_error, busy
from bridge_stg.server.jobs.job import Job, job_not_found

MOST_WAITING = 8


class Renderer:
    """Renders annotated videos in `threads`, each once, within `within_s` seconds per video."""

    def __init__(self, folder: Path, threads: Executor, *, within_s: float) -> None:
        self._folder, self._threads, self._within_s = folder, threads, within_s
        self._rendering: dict[str, asyncio.Future[None]] = {}
        self._waiting: dict[str, int] = {}  # number of requests per job
        self._closed = False

    async def file(self, job: Job) -> Path:
        """Return a job's annotated video. Rendering stops when the last request for it ends. Raises ApiError."""
        path = self._path(job)
        if path.exists():
            return path
        rendering = self._rendering.get(job.id) or self._start(job, path)
        self._waiting[job.id] = self._waiting.get(job.id, 0) + 1
        try:
            await asyncio.shield(rendering)
        except Exception as error:
            if job.id not in self._waiting:
                raise job_not_found() from error
            raise api_error(error, path=job.upload.file.media.path, name=job.upload.name) from error
        finally:
            if job.id in self._waiting:
                self._waiting[job.id] -= 1
        return path

    def forget(self, job: Job) -> None:
        """Delete a job's video."""
        self._waiting.pop(job.id, None)
        self._path(job).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop rendering."""
        self._closed = True

    def _path(self, job: Job) -> Path:
        return self._folder / f"annotated-{job.id}.mp4"

    def _start(self, job: Job, path: Path) -> asyncio.Future[None]:
        if len(self._rendering) >= MOST_WAITING:
            raise busy(f"{MOST_WAITING} videos are being drawn already.", 10)
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._render, job, path)
        self._rendering[job.id] = future
        future.add_done_callback(lambda done: self._rendered(job.id, done))
        return future

    def _rendered(self, job_id: str, done: asyncio.Future[None]) -> None:
        del self._rendering[job_id]
        done.exception()  # marks it as retrieved: nobody may wait any more
        if not self._waiting.get(job_id):
            self._waiting.pop(job_id, None)

    def _render(self, job: Job, path: Path) -> None:
        limits = Limits(deadline_s=self._within_s, cancel=lambda: self._closed or not self._waiting.get(job.id))
        media, duration_s = replace(job.upload.file.media, stream=job.stream), job.upload.file.info.duration_s
        with media.play() as source, replacing(path) as temporary:
            painted = paint_frames(
                source, lambda size: FramePainter(job.results, size, duration_s), progress=lambda *_: limits.check()
            )
            encode_h264(painted, temporary, source.last_end_s)
