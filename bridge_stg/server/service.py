"""The state that all routes of one server share, from its start to its end."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import bridge_stg
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.heads.chat import check_chat
from bridge_stg.runtime.host.worker import TEMPLATE
from bridge_stg.runtime.video.decoder import limit_frames
from bridge_stg.server.http.errors import ApiError, logger, stopping
from bridge_stg.server.http.schemas import NewJob
from bridge_stg.server.jobs.job import Chat, Job, Question, job_not_found
from bridge_stg.server.jobs.render import Renderer
from bridge_stg.server.jobs.scheduler import Scheduler
from bridge_stg.server.live.watch import LiveHub
from bridge_stg.server.metrics import Metrics
from bridge_stg.server.settings import Settings
from bridge_stg.server.videos import isolated
from bridge_stg.server.videos.prefix_cache import OpenVideos
from bridge_stg.server.videos.uploads import Store, Upload

MOST_KEPT_JOBS = 1024
MOST_RESULT_BYTES = 2**28  # memory of the kept results; beyond it the oldest are deleted early
MOST_GONE = 4096  # deleted jobs for which the reason is remembered
SWEEP_S = 5.0

T = TypeVar("T")


class Service:
    """The videos, jobs and live sources of one server over a grounder, which the caller closes after `close`."""

    def __init__(
        self, grounder: Grounder, settings: Settings, *, bundle: str, live_options: dict[str, Any] | None = None
    ) -> None:
        self.settings, self.bundle, self.grounder = settings, bundle, grounder
        self.metrics = Metrics()
        self.metrics.describe(
            version=bridge_stg.__version__,
            bundle=bundle,
            fingerprint=(grounder.bundle or {}).get("fingerprint", ""),
            backend="unknown" if grounder.target is None else grounder.target.summary,
        )
        self.live = LiveHub(grounder, settings.live, self.metrics, live_options or {})
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="bridge-stg files")
        self._probing = ThreadPoolExecutor(2, thread_name_prefix="bridge-stg probing")
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="bridge-stg drawing")
        self.opened = OpenVideos(grounder, most=settings.open_videos, most_bytes=settings.open_bytes)
        self.metrics.gauge("open_videos", "Videos whose prefix is kept.", lambda: len(self.opened))
        self.metrics.gauge("open_video_bytes", "Memory of the kept prefixes.", lambda: self.opened.nbytes)
        self.store = Store(settings, self.metrics, self.opened, writing=self._threads, probing=self._probing)
        self.scheduler = Scheduler(settings, self.metrics, self.opened, self.store)
        self.renderer = Renderer(self.store.folder, self._drawing, within_s=settings.max_seconds)
        self.stopping = False
        self._jobs: dict[str, Job] = {}
        self._gone: dict[str, str] = {}  # why the server deleted a job, by its id
        self._chat_files: deque[Upload] = deque()  # from data URLs of ended chats
        self._sweeper: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the deletion of expired uploads and jobs. Called in the server's event loop."""
        limit_frames(self.settings.max_pixels)  # for live sources
        TEMPLATE.start(isolated.__name__)
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    def begin_stop(self) -> None:
        """Reject new requests, finish running jobs, end all streams. Can be called repeatedly, in the event loop."""
        if self._closing is None:
            self.stopping = True
            self._closing = asyncio.get_running_loop().create_task(self._drain())

    async def close(self) -> None:
        """Stop, and delete everything."""
        self.begin_stop()
        assert self._closing is not None
        await self._closing
        if self._sweeper is not None:
            self._sweeper.cancel()
        for threads in (self._drawing, self._probing, self._threads):
            await asyncio.get_running_loop().run_in_executor(None, threads.shutdown)
        limit_frames(None)
        self.opened.clear()
        self.store.close()

    def abandon(self) -> None:
        """Delete everything without waiting, if the event loop ended before `close` could. Can be called repeatedly."""
        for job in self._jobs.values():
            job.over.set()
        self.renderer.close()
        self.live.stop()
        self.store.close()

    def check_open(self) -> None:
        """Raise ApiError 503 if the server shuts down."""
        if self.stopping:
            raise stopping()

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a function that reads files outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def job(self, job_id: str) -> Job:
        """Return a job, and extend its expiry time. Raises ApiError 404, or 410 if the server deleted it."""
        job = self._jobs.get(job_id)
        if job is None:
            raise job_not_found(self._gone.get(job_id))
        job.used = job.upload.used = time.time()
        return job

    def add_job(self, upload: Upload, new: NewJob) -> Job:
        """Check queries and add them to the queue as a job. Raises as `check_queries` and `Scheduler.add` do."""
        self.check_queries(new.queries)
        most = self.settings.max_seconds
        job = Job(upload, new, min(new.deadline_s or most, most))
        self.scheduler.add(job)
        self._jobs[job.id] = job
        self._delete_surplus()
        return job

    def add_chat(self, upload: Upload, question: Question) -> Chat:
        """Add a question to the queue as a job. Raises as `Scheduler.add` does."""
        chat = Chat(upload, question, self.settings.max_seconds)
        self.scheduler.add(chat)
        self._jobs[chat.id] = chat
        return chat

    def keep_file(self, upload: Upload) -> None:
        """Keep the files of the last data URLs, as many as open videos: clients send them again with each question."""
        self._chat_files.append(upload)
        if len(self._chat_files) > self.settings.open_videos:
            self.remove_video(self._chat_files.popleft())

    def check_queries(self, queries: Sequence[str]) -> None:
        """Check queries before a video is read for them. Raises ApiError 422 or 503, and QueryError."""
        count, most, most_chars = len(queries), self.settings.max_queries, self.settings.max_query_chars
        self.check_open()
        if not queries:
            raise ApiError(422, "query.empty", "The request has no query; describe what to find.")
        if count > most:
            raise ApiError(422, "query.too_many", f"{count} queries; this server accepts at most {most} per job.")
        for query in queries:
            if len(query) > most_chars:
                message = f"A query has {len(query)} characters; this server accepts at most {most_chars}."
                raise ApiError(422, "query.too_long", message)
            self.grounder.check_query(query)

    def check_question(self, question: Question) -> None:
        """Check a question before a video is read for it. Raises ApiError 503, and as the runtime's `check_chat`."""
        self.check_open()
        check_chat(
            self.grounder.spec, question.text, context=question.context, history=question.history,
            max_tokens=question.max_tokens,
        )  # fmt: skip

    def forget(self, job: Job, *, why: str | None = None) -> None:
        """Cancel a job, and delete its answer; `why` is what later requests for it are told."""
        self.scheduler.cancel(job)
        if self._jobs.pop(job.id, None) is not None:
            self.renderer.forget(job)
            if why is not None:
                self._gone[job.id] = why
            if len(self._gone) > MOST_GONE:
                del self._gone[next(iter(self._gone))]

    def remove_video(self, upload: Upload) -> None:
        """Delete a video and all jobs about it."""
        for job in [job for job in self._jobs.values() if job.upload is upload]:
            self.forget(job, why="its video was deleted")
        self.store.remove(upload)

    def _delete_surplus(self) -> None:
        """Delete the oldest ended jobs while there are too many or their results use too much memory."""
        ended = [job for job in self._jobs.values() if job.ended]
        nbytes = sum(job.nbytes for job in ended)
        for job in ended:
            if len(self._jobs) <= MOST_KEPT_JOBS and nbytes <= MOST_RESULT_BYTES:
                return
            nbytes -= job.nbytes
            self.forget(job, why="the answers of newer jobs needed its room")

    async def _drain(self) -> None:
        self.renderer.close()
        await asyncio.gather(self.live.close(), self.scheduler.close(self.settings.drain_s))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_S, self.settings.keep_s / 2))
            try:
                self._delete_expired()
            except Exception:  # noqa: BLE001  # the next round may succeed; without it the disk would fill
                logger.exception("deleting expired videos failed")

    def _delete_expired(self) -> None:
        before = time.time() - self.settings.keep_s
        for job in list(self._jobs.values()):
            if job.ended and job.used < before:
                self.forget(job)
        busy = {job.upload for job in self._jobs.values() if not job.ended}
        for upload in self.store.expired(before):
            if upload not in busy:
                self.remove_video(upload)
