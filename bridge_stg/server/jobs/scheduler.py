"""Which jobs are worked on, and together: a bounded queue, and batches of all queries that wait on one video.

The scheduler lives in the event loop; a batch runs in a worker thread. One batch at a time works on a video, and what
comes meanwhile is the next batch: under load batches grow by themselves, without a delay for others to come.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from bridge_stg.runtime.chain.opened_video import OpenedVideo
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.tasks import Task
from bridge_stg.runtime.errors import BridgeError, Interrupted
from bridge_stg.runtime.host.limits import Limits, Progress
from bridge_stg.server.http.errors import ApiError, api_error, full, stopping
from bridge_stg.server.jobs.job import Job
from bridge_stg.server.metrics import Metrics
from bridge_stg.server.settings import Settings
from bridge_stg.server.videos.prefix_cache import OpenVideos
from bridge_stg.server.videos.probe import FileLimits
from bridge_stg.server.videos.uploads import Store, StoredFile

MOST_BATCH_QUERIES = 64
VIDEO_STAGES = ("decode_video", "vision_coarse", "prefill")
FIRST_GUESS_S = 2.0

Answers: TypeAlias = "tuple[tuple[Grounding, ...], str]"
Outcome: TypeAlias = "Answers | BaseException"


@dataclass(eq=False)
class Batch:
    """Jobs on one video that ask the same kind of question."""

    file: StoredFile
    task: str
    allow_none: bool
    jobs: list[Job]

    def over(self) -> bool:
        """Whether nobody waits for any of it."""
        return all(job.over.is_set() for job in self.jobs)

    @property
    def queries(self) -> list[str]:
        """All queries, each once."""
        return list(dict.fromkeys(query for job in self.jobs for query in job.queries))


class Scheduler:
    """The queue of one server and the threads that work on it.

    Args:
        opened: videos whose prefix is computed.
        store: holds the files while they are worked on.
    """

    def __init__(self, settings: Settings, metrics: Metrics, opened: OpenVideos, store: Store) -> None:
        self._settings, self._metrics, self._opened, self._store = settings, metrics, opened, store
        self._waiting: list[Job] = []
        self._running: dict[str, Batch] = {}
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="bridge-stg worker")
        self._job_s = FIRST_GUESS_S
        self._closed = self._hurried = False
        self._most_frames = FileLimits(settings.max_pixels, settings.max_duration_s).max_frames
        metrics.gauge("queue_length", "Jobs that wait.", lambda: len(self._waiting))
        metrics.gauge("running_batches", "Batches that are worked on.", lambda: len(self._running))

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that are worked on."""
        return sum(not job.ended for batch in list(self._running.values()) for job in batch.jobs)

    def position(self, job: Job) -> int | None:
        """Return how many jobs wait before one, None if it does not wait."""
        return self._waiting.index(job) if job in self._waiting else None

    def check_room(self) -> None:
        """Raise ApiError if no job can be taken: 429 if the queue is full, 503 if the server ends."""
        if self._closed:
            raise stopping()
        if len(self._waiting) >= self._settings.max_queue:
            wait_s = min(self._settings.max_seconds, self._job_s * len(self._waiting) / self._settings.workers)
            raise full(
                f"{len(self._waiting)} jobs are waiting already; try again in {max(1, round(wait_s))} s.", wait_s
            )

    def add(self, job: Job) -> None:
        """Take a job. Raises ApiError as `check_room` does."""
        self.check_room()
        self._waiting.append(job)
        job.timer = asyncio.get_running_loop().call_later(job.deadline_s, self._too_late, job)
        self._start_some()

    def cancel(self, job: Job, *, refusal: ApiError | None = None) -> None:
        """Give a job up; its work stops at the next step of the runtime. With a refusal it has failed by that."""
        if job.ended:
            return
        if job in self._waiting:
            self._waiting.remove(job)
            for other in self._waiting:
                other.notify()
        self._end(job, "cancelled" if refusal is None else "failed", refusal=refusal)

    async def close(self, drain_s: float) -> None:
        """Refuse what waits, let what runs end for a while, then stop it."""
        self._closed = True
        for job in list(self._waiting):
            self.cancel(job, refusal=stopping())
        loop = asyncio.get_running_loop()
        until = loop.time() + drain_s
        while self._running and loop.time() < until and not self._hurried:
            await asyncio.sleep(0.02)
        for batch in list(self._running.values()):
            for job in batch.jobs:
                self.cancel(job, refusal=stopping())
        while self._running:
            await asyncio.sleep(0.02)
        self._threads.shutdown(wait=True)

    def hurry(self) -> None:
        """Let `close` wait no longer for what runs."""
        self._hurried = True

    def _too_late(self, job: Job) -> None:
        if not job.ended:
            what = "waiting" if job.status == "queued" else (job.progress or {}).get("stage", "running")
            self.cancel(
                job,
                refusal=ApiError(
                    408,
                    "deadline",
                    f"The job's {job.deadline_s:g} s passed at: {what}. Give it more time, a shorter video "
                    "or fewer queries, or ask when less is waiting.",
                ),
            )

    def _start_some(self) -> None:
        while len(self._running) < self._settings.workers:
            first = next((job for job in self._waiting if job.upload.file.key not in self._running), None)
            if first is None:
                break
            self._start(self._batch(first))
        for job in self._waiting:
            job.notify()

    def _batch(self, first: Job) -> Batch:
        """Take a job from the queue, and all that wait to ask the same of the same video."""
        batch = Batch(first.upload.file, first.task, first.allow_none, [])
        asked = 0
        for job in list(self._waiting):
            same = job.upload.file is batch.file and (job.task, job.allow_none) == (batch.task, batch.allow_none)
            if same and (job is first or asked + len(job.queries) <= MOST_BATCH_QUERIES):
                self._waiting.remove(job)
                batch.jobs.append(job)
                asked += len(job.queries)
        return batch

    def _start(self, batch: Batch) -> None:
        loop = asyncio.get_running_loop()
        self._running[batch.file.key] = batch
        self._store.hold(batch.file)
        for job in batch.jobs:
            job.change("running")
        self._metrics.batch_queries.observe(len(batch.queries))
        began = loop.time()
        future = loop.run_in_executor(self._threads, self._run, batch, loop)
        future.add_done_callback(lambda done: self._ended(batch, done, loop.time() - began))

    def _ended(self, batch: Batch, done: asyncio.Future[list[Outcome]], took_s: float) -> None:
        del self._running[batch.file.key]
        self._store.release(batch.file)
        self._job_s += 0.2 * (took_s / len(batch.jobs) - self._job_s)
        error = done.exception()
        outcomes: Sequence[Outcome] = [error] * len(batch.jobs) if error is not None else done.result()
        for job, outcome in zip(batch.jobs, outcomes, strict=True):
            if job.ended:
                continue
            if isinstance(outcome, BaseException):
                refusal = api_error(outcome, path=batch.file.path, name=job.upload.name)
                self._end(job, "failed", refusal=refusal)
            else:
                job.results, job.results_text = outcome
                self._end(job, "done")
        if not self._closed:
            self._start_some()

    def _end(self, job: Job, status: str, *, refusal: ApiError | None = None) -> None:
        job.refusal = refusal
        job.over.set()
        if job.timer is not None:
            job.timer.cancel()
        job.change(status)
        self._metrics.jobs.labels(status).inc()
        self._metrics.job_seconds.observe(asyncio.get_running_loop().time() - job.began)
        if refusal is not None:
            self._metrics.refused.labels(refusal.code).inc()

    # What follows runs in a worker thread.

    def _run(self, batch: Batch, loop: asyncio.AbstractEventLoop) -> list[Outcome]:
        """Answer a batch: its jobs' groundings, or what went wrong with each."""
        progress = self._progress(batch, loop)
        with self._opened.lease(batch.file.key, batch.file.path, cancel=batch.over, progress=progress) as (
            video,
            opened,
        ):
            (self._metrics.videos_opened if opened else self._metrics.videos_reused).inc()
            try:
                return self._answer(video, batch, batch.jobs, opened, progress)
            except Interrupted:
                raise
            except BridgeError as error:
                if len(batch.jobs) == 1:
                    raise
                spoiled: BaseException = error
            outcomes: list[Outcome] = []
            for job in batch.jobs:  # so that one job's query fails that job alone
                try:
                    outcomes += self._answer(video, batch, [job], False, progress)
                except BridgeError as error:
                    spoiled = error
                    outcomes.append(spoiled)
            return outcomes

    def _answer(
        self, video: OpenedVideo, batch: Batch, jobs: list[Job], opened: bool, progress: Progress
    ) -> list[Outcome]:
        queries = list(dict.fromkeys(query for job in jobs for query in job.queries))
        task = Task("span" if batch.task == "span" else "tube", allow_none=batch.allow_none)
        over: Callable[[], bool] = lambda: all(job.over.is_set() for job in jobs)  # noqa: E731
        groundings = video.ground_within(Limits(cancel=over, progress=progress), queries, task)
        timings = groundings[0].timings
        shared = () if opened else VIDEO_STAGES
        self._metrics.observe_stages({stage: s for stage, s in timings.items() if stage not in (*shared, "total")})
        answers = {query: dataclasses.replace(one, taps=None) for query, one in zip(queries, groundings, strict=True)}
        texts = {query: json.dumps(answer.to_json(), ensure_ascii=False) for query, answer in answers.items()}
        return [
            (tuple(answers[query] for query in job.queries), f"[{', '.join(texts[query] for query in job.queries)}]")
            for job in jobs
        ]

    def _progress(self, batch: Batch, loop: asyncio.AbstractEventLoop) -> Progress:
        """Return a callback that hands progress to the jobs, and stops a video that is longer than its packets said."""
        frames = 0
        sent: tuple[str, float] = ("", 0.0)

        def tell(stage: str, done: float, total: float | None) -> None:
            for job in batch.jobs:
                job.tell(stage, done, total)

        def progress(stage: str, done: float, total: float | None) -> None:
            nonlocal frames, sent
            if stage == "decode_video":
                frames += 1
                if done > 1.1 * self._settings.max_duration_s + 1 or frames > self._most_frames + 1:
                    raise ApiError(413, "duration", "The video is longer than its header says, and than is taken here.")
            now = loop.time()
            if stage != sent[0] or done == total or now > sent[1] + 0.1:
                sent = (stage, now)
                loop.call_soon_threadsafe(tell, stage, done, total)

        return progress
