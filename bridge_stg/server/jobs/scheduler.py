"""A bounded queue of jobs, run in batches of all queries that wait for the same video.

The scheduler lives in the event loop; a batch runs in a worker thread. One batch at a time runs per video, and the jobs
that arrive in the meantime are the next batch, so batches grow under load, without a delay.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from bridge_stg.runtime.chain.opened_video import OpenedVideo
from bridge_stg.runtime.chain.results import VIDEO_STAGES, Grounding
from bridge_stg.runtime.chain.tasks import Task
from bridge_stg.runtime.errors import BridgeError, Interrupted
from bridge_stg.runtime.host.limits import Limits, Progress
from bridge_stg.runtime.live.source import LiveSource
from bridge_stg.runtime.search.options import is_longer
from bridge_stg.server.http.errors import ApiError, api_error, busy, stopping
from bridge_stg.server.jobs.job import Chat, Job
from bridge_stg.server.metrics import Metrics
from bridge_stg.server.settings import Settings
from bridge_stg.server.videos.prefix_cache import OpenVideos
from bridge_stg.server.videos.uploads import Store, StoredFile

MOST_BATCH_QUERIES = 64
FIRST_GUESS_S = 2.0
POLL_S = 0.02
PROGRESS_EVERY_S = 0.1

Outcome: TypeAlias = "tuple[tuple[Grounding, ...], str] | BaseException"
"""What a batch returns per job: the results, also as JSON; or the error."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Jobs about one file with the same video stream, task and options."""

    file: StoredFile
    stream: int | None
    task: Task
    jobs: list[Job]

    def over(self) -> bool:
        """Return whether no client waits for any of the answers."""
        return all(job.over.is_set() for job in self.jobs)

    @property
    def queries(self) -> list[str]:
        """The deduplicated queries of all jobs."""
        return list(dict.fromkeys(query for job in self.jobs for query in job.queries))


class Scheduler:
    """The queue of one server and its worker threads."""

    def __init__(self, settings: Settings, metrics: Metrics, opened: OpenVideos, store: Store) -> None:
        self._settings, self._metrics, self._opened, self._store = settings, metrics, opened, store
        self._waiting: list[Job] = []
        self._running: dict[str, Batch] = {}
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="bridge-stg worker")
        self._job_s = FIRST_GUESS_S
        self._closed = self._hurried = False
        metrics.gauge("queue_length", "Jobs in the queue.", lambda: len(self._waiting))
        metrics.gauge("running_batches", "Batches that run.", lambda: len(self._running))

    @property
    def waiting(self) -> int:
        """Number of jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of jobs that run."""
        return sum(not job.ended for batch in list(self._running.values()) for job in batch.jobs)

    def position(self, job: Job) -> int | None:
        """Return the number of jobs ahead in the queue, or None if the job is not queued."""
        return self._waiting.index(job) if job in self._waiting else None

    def check_room(self) -> None:
        """Raise ApiError 429 if the queue is full."""
        count = len(self._waiting)
        if count >= self._settings.max_queue:
            wait_s = min(self._settings.max_seconds, self._job_s * count / self._settings.workers)
            raise busy(f"{count} jobs are waiting already; try again in {max(1, round(wait_s))} s.", wait_s)

    def add(self, job: Job) -> None:
        """Add a job to the queue. Raises ApiError as `check_room` does."""
        self.check_room()
        self._waiting.append(job)
        job.timer = asyncio.get_running_loop().call_later(job.deadline_s, self._too_late, job)
        self._start_batches()

    def cancel(self, job: Job, *, error: ApiError | None = None) -> None:
        """Stop a job at the next step of the runtime. With an error it has failed, otherwise it is cancelled."""
        if job.ended:
            return
        if job in self._waiting:
            self._waiting.remove(job)
            for other in self._waiting:
                other.notify()
        self._end(job, "cancelled" if error is None else "failed", error=error)

    async def close(self, drain_s: float) -> None:
        """Fail the jobs in the queue, let the running ones finish for `drain_s` seconds, then stop them."""
        self._closed = True
        for job in list(self._waiting):
            self.cancel(job, error=stopping())
        until = time.monotonic() + drain_s
        while self._running and time.monotonic() < until and not self._hurried:
            await asyncio.sleep(POLL_S)
        for batch in list(self._running.values()):
            for job in batch.jobs:
                self.cancel(job, error=stopping())
        while self._running:
            await asyncio.sleep(POLL_S)
        self._threads.shutdown(wait=True)

    def hurry(self) -> None:
        """Make `close` stop waiting for running jobs."""
        self._hurried = True

    def _too_late(self, job: Job) -> None:
        stage = "waiting" if job.status == "queued" else (job.progress or {}).get("stage", "running")
        message = (
            f"The job's {job.deadline_s:g} s passed during stage {stage}. Give it more time, a shorter video or fewer "
            "queries, or try again when fewer jobs wait."
        )
        self.cancel(job, error=ApiError(408, "call.deadline", message))

    def _start_batches(self) -> None:
        for first in list(self._waiting):
            free = len(self._running) < self._settings.workers and first.upload.file.key not in self._running
            if free and first in self._waiting:
                self._start(self._batch(first))
        for job in self._waiting:
            job.notify()

    def _batch(self, first: Job) -> Batch:
        """Remove a job from the queue, with all jobs that have the same video, task and options."""
        batch, queries = Batch(first.upload.file, first.stream, first.runtime_task, []), 0
        for job in list(self._waiting):
            same = job.batch_key == first.batch_key
            if same and (job is first or queries + len(job.queries) <= MOST_BATCH_QUERIES):
                self._waiting.remove(job)
                batch.jobs.append(job)
                queries += len(job.queries)
        return batch

    def _start(self, batch: Batch) -> None:
        loop = asyncio.get_running_loop()
        self._running[batch.file.key] = batch
        self._store.hold(batch.file)
        for job in batch.jobs:
            job.change("running")
        self._metrics.batch_queries.observe(len(batch.queries))
        began = time.monotonic()
        future = loop.run_in_executor(self._threads, self._run, batch, loop)
        future.add_done_callback(lambda done: self._ended(batch, done, time.monotonic() - began))

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
                self._end(job, "failed", error=api_error(outcome, path=batch.file.media.path, name=job.upload.name))
            else:
                job.results, job.results_text = outcome
                self._end(job, "done")
        if not self._closed:
            self._start_batches()

    def _end(self, job: Job, status: str, *, error: ApiError | None = None) -> None:
        job.error = error
        job.over.set()
        if job.timer is not None:
            job.timer.cancel()
        job.change(status)
        self._metrics.jobs.labels(status).inc()
        self._metrics.job_seconds.observe(time.monotonic() - job.began)
        if error is not None:
            self._metrics.errors.labels(error.code).inc()

    # The methods below run in a worker thread.

    def _run(self, batch: Batch, loop: asyncio.AbstractEventLoop) -> list[Outcome]:
        """Return the results of each job of a batch, or its error."""
        progress = self._progress(batch, loop)
        media = dataclasses.replace(batch.file.media, stream=batch.stream)
        chat = batch.jobs[0]
        context = chat.question.context if isinstance(chat, Chat) else ()
        duration_s = batch.file.info.duration_s
        if not isinstance(chat, Chat) and is_longer(duration_s, self._opened.grounder.spec):
            self._metrics.videos_opened.inc()
            return self._search(batch, media.live(duration_s), progress)
        opening = self._opened.lease(
            batch.file.key, media, context=context, cancel=batch.over, progress=progress,
            image_only=batch.task.name == "image",
        )  # fmt: skip
        with opening as (video, new):
            (self._metrics.videos_opened if new else self._metrics.videos_reused).inc()
            if isinstance(chat, Chat):
                return [self._reply(video, chat, progress, loop)]
            try:
                return self._answer(video, batch, progress, new=new)
            except BridgeError as error:
                if isinstance(error, Interrupted) or len(batch.jobs) == 1:
                    raise
            outcomes: list[Outcome] = []
            for job in batch.jobs:  # one by one, so that a bad query fails its own job only
                try:
                    outcomes += self._answer(video, dataclasses.replace(batch, jobs=[job]), progress, new=False)
                except BridgeError as error:
                    outcomes.append(error)
            return outcomes

    def _reply(self, video: OpenedVideo, chat: Chat, progress: Progress, loop: asyncio.AbstractEventLoop) -> Outcome:
        """Answer a chat, and add its pieces to the job while the model writes them."""
        limits = Limits(cancel=chat.over, progress=progress)
        question = chat.question
        answer = video.ask_within(limits, question.text, history=question.history, max_tokens=question.max_tokens)
        for piece in answer:
            loop.call_soon_threadsafe(chat.add, piece)
        chat.finish_reason = answer.finish_reason
        chat.usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": answer.prompt_tokens + answer.tokens,
        }
        self._metrics.chat_tokens.inc(answer.tokens)
        return (), "[]"  # no groundings

    def _answer(self, video: OpenedVideo, batch: Batch, progress: Progress, *, new: bool) -> list[Outcome]:
        queries = batch.queries
        groundings = video.ground_within(Limits(cancel=batch.over, progress=progress), queries, batch.task)
        skipped = ("total",) if new else ("total", *VIDEO_STAGES)
        for stage, seconds in groundings[0].timings.items():
            if stage not in skipped:
                self._metrics.stages.labels(stage).observe(seconds)
        answers = {query: dataclasses.replace(one, taps=None) for query, one in zip(queries, groundings, strict=True)}
        texts = {query: json.dumps(answer.to_json(), ensure_ascii=False) for query, answer in answers.items()}
        return [
            (tuple(answers[query] for query in job.queries), f"[{', '.join(texts[query] for query in job.queries)}]")
            for job in batch.jobs
        ]

    def _search(self, batch: Batch, source: LiveSource, progress: Progress) -> list[Outcome]:
        """Answer the jobs of a batch on a video that is longer than the model reads at once."""
        task = batch.task
        found = self._opened.grounder.search(
            source, batch.queries, task=task.name, allow_none=task.allow_none, cancel=batch.over, progress=progress
        )
        drawn = {result.query: dataclasses.replace(result.drawn, taps=None) for result in found}
        texts = {result.query: json.dumps(result.to_json(), ensure_ascii=False) for result in found}
        return [
            (tuple(drawn[query] for query in job.queries), f"[{', '.join(texts[query] for query in job.queries)}]")
            for job in batch.jobs
        ]

    def _progress(self, batch: Batch, loop: asyncio.AbstractEventLoop) -> Progress:
        """Return a callback that reports to the jobs, and stops a video that is longer than its packets said."""
        frames = 0
        sent: tuple[str, float] = ("", 0.0)

        def report(stage: str, done: float, total: float | None) -> None:
            for job in batch.jobs:
                job.report(stage, done, total)

        def progress(stage: str, done: float, total: float | None) -> None:
            nonlocal frames, sent
            if stage == "decode_video":
                frames += 1
                if done > 1.1 * self._settings.max_duration_s + 1 or frames > self._settings.max_frames + 1:
                    message = "The video is longer than its header says, and than this server accepts."
                    raise ApiError(413, "video.too_long", message)
            now = time.monotonic()
            if stage != sent[0] or done == total or now > sent[1] + PROGRESS_EVERY_S:
                sent = (stage, now)
                loop.call_soon_threadsafe(report, stage, done, total)

        return progress
