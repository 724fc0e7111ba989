"""All that the routes of one server share, from its start to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bridge_stg
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.video.decoder import limit_frames
from bridge_stg.server.http.errors import ApiError, logger, stopping
from bridge_stg.server.jobs.job import Job, gone
from bridge_stg.server.jobs.render import Renderer
from bridge_stg.server.jobs.scheduler import Scheduler
from bridge_stg.server.live.watch import LiveHub
from bridge_stg.server.metrics import Metrics
from bridge_stg.server.settings import Settings
from bridge_stg.server.videos.prefix_cache import OpenVideos
from bridge_stg.server.videos.uploads import Store, Upload

MOST_KEPT_JOBS = 1024
MOST_RESULT_BYTES = 2**28
"""Results that are kept beyond this make the oldest ones go before their time."""
SWEEP_S = 5.0


class Service:
    """One server's videos, jobs and live sources.

    Args:
        grounder: what answers; the caller closes it, after `close`.
        settings: the operator's.
        bundle: what the bundle is called.
        live_options: the fields of `LiveOptions`.

    Raises:
        BridgeError: a live source is nothing that can be watched.
    """

    def __init__(
        self, grounder: Grounder, settings: Settings, *, bundle: str, live_options: dict[str, Any] | None = None
    ) -> None:
        self.settings, self.bundle, self.grounder = settings, bundle, grounder
        self.metrics = Metrics()
        self.live = LiveHub(grounder, dict(settings.live), self.metrics, options=live_options)
        self.threads = ThreadPoolExecutor(4, thread_name_prefix="bridge-stg files")
        self._probing = ThreadPoolExecutor(2, thread_name_prefix="bridge-stg probing")
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="bridge-stg drawing")
        self.opened = OpenVideos(grounder, most=settings.open_videos, most_bytes=settings.open_bytes)
        self.metrics.gauge("open_videos", "Videos whose prefix is kept.", lambda: len(self.opened))
        self.metrics.gauge("open_video_bytes", "What they hold in memory.", lambda: self.opened.nbytes)
        self.store = Store(settings, self.metrics, self.opened, writing=self.threads, probing=self._probing)
        self.scheduler = Scheduler(settings, self.metrics, self.opened, self.store)
        self.renderer = Renderer(self.store.folder, self._drawing, within_s=settings.max_seconds)
        self.stopping = False
        self._jobs: dict[str, Job] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sweep; called in the event loop that serves."""
        limit_frames(self.settings.max_pixels)
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    def begin_stop(self) -> None:
        """Take nothing new, let running jobs end for `drain_s`, end all streams. In the event loop; may be repeated."""
        if self._closing is None:
            self.stopping = True
            self._closing = asyncio.get_running_loop().create_task(self._drain())

    def hurry(self) -> None:
        """Let running jobs end no longer. In the event loop; may be repeated."""
        self.scheduler.hurry()

    async def close(self) -> None:
        """Stop, and delete everything."""
        self.begin_stop()
        assert self._closing is not None
        await self._closing
        if self._sweeper is not None:
            self._sweeper.cancel()
        loop = asyncio.get_running_loop()
        for threads in (self._drawing, self._probing, self.threads):
            await loop.run_in_executor(None, threads.shutdown)
        limit_frames(None)
        self.opened.clear()
        self.store.close()

    def abandon(self) -> None:
        """Delete everything without waiting, where the event loop ended before `close` could. May be called again."""
        for job in self._jobs.values():
            job.over.set()
        self.renderer.close()
        self.live.stop()
        self.store.close()

    def check_open(self) -> None:
        """Raise ApiError 503 if the server ends."""
        if self.stopping:
            raise stopping()

    async def in_thread(self, work: Any, *arguments: Any) -> Any:
        """Run what reads files, not in the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def job(self, job_id: str) -> Job:
        """Return a job. Raises ApiError 404."""
        job = self._jobs.get(job_id)
        if job is None:
            raise gone()
        job.used = job.upload.used = time.time()
        return job

    def add_job(
        self,
        upload: Upload,
        queries: Sequence[str],
        *,
        task: str = "ground",
        allow_none: bool = True,
        deadline_s: float | None = None,
    ) -> Job:
        """Check what is asked, and put it into the queue.

        Raises:
            ApiError: 413 for too many queries or too long ones, 422 for others that cannot be asked, 429 if there is no
                room, 503 if the server ends.
            QueryError: a query is empty.
        """
        self.check_queries(queries)
        most = self.settings.max_seconds
        job = Job(upload, queries, task=task, allow_none=allow_none, deadline_s=min(deadline_s or most, most))
        self.scheduler.add(job)
        self._jobs[job.id] = job
        self._forget_some()
        return job

    def check_queries(self, queries: Sequence[str]) -> None:
        """Raise ApiError or QueryError as `add_job` does, before a video is read for them."""
        settings, most = self.settings, self.settings.max_query_chars
        self.check_open()
        if not queries:
            raise ApiError(422, "query", "There is no query; say in words what to find.")
        if len(queries) > settings.max_queries:
            raise ApiError(
                413, "queries", f"{len(queries)} queries; this server takes {settings.max_queries} at a time."
            )
        for query in queries:
            if len(query) > most:
                raise ApiError(413, "query_length", f"A query has {len(query)} characters; this server takes {most}.")
            self.grounder.check_query(query)

    def forget(self, job: Job) -> None:
        """Give a job up, and forget its answer."""
        self.scheduler.cancel(job)
        if self._jobs.pop(job.id, None) is not None:
            self.renderer.forget(job)

    def remove_video(self, upload: Upload) -> None:
        """Delete a video and all jobs about it."""
        for job in [job for job in self._jobs.values() if job.upload is upload]:
            self.forget(job)
        self.store.remove(upload)

    def health(self) -> dict[str, Any]:
        """Return how the server is."""
        settings, target = self.settings, self.grounder.target
        return {
            "status": "stopping" if self.stopping else "ok",
            "version": bridge_stg.__version__,
            "bundle": self.bundle,
            "backend": "unknown" if target is None else target.summary,
            "verified": self.grounder.verified,
            "queue": {
                "waiting": self.scheduler.waiting,
                "running": self.scheduler.running,
                "most_waiting": settings.max_queue,
            },
            "limits": {
                "upload_bytes": settings.max_upload_bytes,
                "duration_s": settings.max_duration_s,
                "pixels": settings.max_pixels,
                "queries": settings.max_queries,
                "query_chars": settings.max_query_chars,
                "seconds": settings.max_seconds,
            },
        }

    def _forget_some(self) -> None:
        """Forget the jobs that ended first, where there are too many or they hold too much."""
        ended = [job for job in self._jobs.values() if job.ended]
        held = sum(job.nbytes for job in ended)
        for job in ended:
            if len(self._jobs) <= MOST_KEPT_JOBS and held <= MOST_RESULT_BYTES:
                return
            held -= job.nbytes
            self.forget(job)

    async def _drain(self) -> None:
        self.renderer.close()
        await asyncio.gather(self.live.close(), self.scheduler.close(self.settings.drain_s))

    async def _sweep(self) -> None:
        """Forget what nobody has asked for during `keep_s`."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self.settings.keep_s / 2))
            try:
                self.sweep()
            except Exception:
                logger.exception("sweeping failed")

    def sweep(self) -> None:
        """Do once what `_sweep` does again and again."""
        before = time.time() - self.settings.keep_s
        for job in list(self._jobs.values()):
            if job.ended and job.used < before:
                self.forget(job)
        busy = {job.upload for job in self._jobs.values() if not job.ended}
        for upload in self.store.expired():
            if upload not in busy:
                self.remove_video(upload)
