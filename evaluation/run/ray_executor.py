"""The executor `ray`: actors of Ray, one per device, each with its own model, answer units of work.

The driver sends each actor one unit at a time: its memory does not grow with their number, and it knows at which unit
an actor died. It replaces such actors, and gives up a unit that killed several. Knows nothing of the units. Ray is
imported when an executor is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bridge_stg.evaluation.run.executor import Answers, Lost, Opener
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.cpus import usable_cpus

ATTEMPTS = 2
"""How often a unit is started before it is given up: a process may also die for other reasons than the unit."""
OBJECT_STORE_BYTES = 2**28
"""Large answers only; Ray's default is 30 % of the memory, which the models need."""
LONGEST_TEMPORARY = 24
"""Most characters of the folder for temporary files: the paths of Ray's sockets in it may have at most 103."""


@dataclass(frozen=True)
class RayExecutor:
    """Runs units on Ray: each actor opens the model once, and reserves `resources` (`num_gpus`, or `num_cpus`)."""

    workers: int
    threads: int
    resources: dict[str, float]

    def answers(self, open_model: Opener, answer: Callable[[Any, Any], Any], units: Sequence[Any]) -> Answers:
        """Yield the results; see `Executor.answers`. Raises EngineError if the processes that load the model die."""
        from ray import cloudpickle
        from ray.exceptions import RayError

        if not units:
            return
        paths = {"modules": [path or os.getcwd() for path in sys.path], "cwd": [os.getcwd()]}  # for the actors' imports
        job = cloudpickle.dumps(Job(open_model, answer, self.threads))
        pool = _Pool(min(self.workers, len(units)), self.resources, paths, job, units)
        try:
            yield from pool.answers()
        except RayError as error:
            message = f"Ray failed: {type(error).__name__}: {_first_line(error)}"
            raise EngineError("evaluation.executor_failed", message) from error
        finally:
            pool.close()


@dataclass(eq=False)
class _Actor:
    """An actor, with the reference to the result of its task; `place` is that of the unit, None: it opens the model."""

    handle: Any
    task: Any
    place: int | None = None


class _Pool:
    """The actors of a run."""

    def __init__(
        self, size: int, resources: dict[str, float], paths: dict[str, list[str]], job: bytes, units: Sequence[Any]
    ) -> None:
        import ray

        self._worker = ray.remote(max_restarts=0, **resources)(_worker_class())
        self._arguments = paths, ray.put(job)
        self._units = units
        self._new = iter(range(len(units)))
        self._again: deque[int] = deque()
        self._left = len(units)  # units without an answer
        self._started: Counter[int] = Counter()  # by place, for units whose actor died
        self._size, self._died_opening = size, 0
        self._actors = [self._start() for _ in range(size)]

    def answers(self) -> Iterator[tuple[int, Any]]:
        """Yield the place and the result of each unit."""
        import ray
        from ray import cloudpickle
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

        while self._left:
            busy = {actor.task: actor for actor in self._actors if actor.task is not None}
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            actor = busy[ready]
            try:
                raised, data = ray.get(ready)
            except (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError) as error:
                yield from self._replace(actor, error)
                continue
            value, place = cloudpickle.loads(data), actor.place
            if raised:
                raise value
            self._send(actor)
            if place is None:
                self._died_opening = 0
            else:
                self._left -= 1
                yield place, value

    def close(self) -> None:
        """End the actors."""
        import ray

        if ray.is_initialized():  # otherwise this call would start a new Ray
            for actor in self._actors:
                ray.kill(actor.handle)

    def _start(self) -> _Actor:
        handle = self._worker.remote(*self._arguments)
        return _Actor(handle, handle.open.remote())

    def _send(self, actor: _Actor) -> None:
        """Send an actor its next unit, if there is one."""
        from ray import cloudpickle

        actor.place = self._again.popleft() if self._again else next(self._new, None)
        actor.task = None
        if actor.place is not None:
            actor.task = actor.handle.answer.remote(cloudpickle.dumps(self._units[actor.place]))

    def _replace(self, actor: _Actor, error: Exception) -> Iterator[tuple[int, Any]]:
        """Start another actor for one that died. Yield the unit that it was at, if this happened too often.

        Raises EngineError if the last actor, like several before, died while it opened the model.
        """
        import ray

        ray.kill(actor.handle)  # it may only be out of reach
        self._actors.remove(actor)
        place = actor.place
        if place is None:
            self._died_opening += 1
        else:
            self._started[place] += 1
            if self._started[place] < ATTEMPTS:
                self._again.appendleft(place)
            else:
                self._left -= 1
                died = f"the worker process died {ATTEMPTS} times at this, perhaps for lack of memory"
                yield place, Lost(f"EngineError: {died}")
        if self._died_opening < ATTEMPTS * self._size:
            self._actors.append(self._start())
        elif self._actors:
            for other in self._actors:
                if other.task is None:
                    self._send(other)
        else:
            what = f"{self._died_opening} worker processes died while they loaded the model"
            hint = "if memory ran out, give fewer --workers"
            raise EngineError("evaluation.worker_died", f"{what} ({_first_line(error)}); {hint}.")


@contextmanager
def ray_executor(*, workers: int | None = None, threads: int | None = None) -> Iterator[RayExecutor]:
    """Open an executor: on a Ray that this program started, on the cluster at RAY_ADDRESS, else on a local one.

    The local one ends with the context; it has no dashboard, sends no statistics, and keeps its files in a temporary
    folder. On a cluster, this package, the model and the media must be on every node, at the same absolute paths.

    Args:
        workers: number of actors, by default 1; with GPUs, the most actors, by default one per GPU.
        threads: CPU threads of each; by default they share the CPUs.

    Raises:
        EngineError: Ray cannot be started or reached.
        ImportError: Ray is missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            _start(stack, workers)
        yield _executor(workers, threads)


def _start(stack: contextlib.ExitStack, workers: int | None) -> None:
    """Connect to the cluster at RAY_ADDRESS or start a local Ray; the stack ends it."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        base = tempfile.gettempdir()
        base = "/tmp" if len(base) > LONGEST_TEMPORARY and os.path.isdir("/tmp") else base
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir=base, ignore_cleanup_errors=True)
        options |= {
            "num_cpus": max(usable_cpus(), workers or 1), "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": stack.enter_context(folder),
        }  # fmt: skip
    stack.callback(ray.shutdown)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray replaced the program's
    except (OSError, RuntimeError, ValueError) as error:
        message = f"Ray could not be started: {_first_line(error)}. --executor local does not need it."
        raise EngineError("evaluation.executor_failed", message) from error


def _executor(workers: int | None, threads: int | None) -> RayExecutor:
    """Divide Ray's resources: one actor per GPU, or `workers` actors; no share is larger than the smallest node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = sum(node["CPU"] for node in nodes)
    count = min(gpus, workers or gpus) if gpus else workers or 1
    share = min([cpus / count, *(node["CPU"] for node in nodes)])
    whole = max(1, int(share))
    return RayExecutor(count, threads or whole, {"num_gpus": 1} if gpus else {"num_cpus": min(share, whole)})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@dataclass(frozen=True)
class Job:
    """The work of every actor; `threads` are those of the executor."""

    open_model: Opener
    answer: Callable[[Any, Any], Any]
    threads: int


class Answering:
    """The state of an actor, from its pickled `Job`.

    Each method returns whether an exception was raised, and the pickled exception or value: Ray would wrap it.
    """

    def __init__(self, job: bytes) -> None:
        self._pickled = job
        self._open = contextlib.ExitStack()

    def open(self) -> tuple[bool, bytes]:
        """Open the model."""
        return _pickled(self._open_model)

    def answer(self, unit: bytes) -> tuple[bool, bytes]:
        """Answer a pickled unit."""
        from ray import cloudpickle

        return _pickled(lambda: self._job.answer(self._model, cloudpickle.loads(unit)))

    def _open_model(self) -> None:
        from ray import cloudpickle

        self._job: Job = cloudpickle.loads(self._pickled)
        os.environ["OMP_NUM_THREADS"] = str(self._job.threads)  # torch reads it when it is imported
        self._model = self._open.enter_context(self._job.open_model())


def _pickled(call: Callable[[], Any]) -> tuple[bool, bytes]:
    from ray import cloudpickle

    try:
        return False, cloudpickle.dumps(call())
    except Exception as error:  # noqa: BLE001 - the caller raises it as it is
        return True, _pickled_error(error)


def _pickled_error(error: Exception) -> bytes:
    from ray import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(data)
    except Exception:  # noqa: BLE001 - an exception that cannot be unpickled may raise anything
        data = cloudpickle.dumps(EngineError("evaluation.executor_failed", f"{type(error).__name__}: {error}"))
    return data


def _worker_class() -> type:
    """Return the class of the actors.

    A class of a function is pickled by value: until it has set up its process, this package cannot be imported there.
    """

    class Worker:
        def __init__(self, paths: dict[str, list[str]], job: bytes) -> None:
            import os
            import sys

            if os.path.isdir(paths["cwd"][0]):
                os.chdir(paths["cwd"][0])  # media may be named by relative paths
            sys.path += [path for path in paths["modules"] if path not in sys.path]
            from bridge_stg.evaluation.run.ray_executor import Answering

            self.answering = Answering(job)

        def open(self) -> tuple[bool, bytes]:
            return self.answering.open()

        def answer(self, unit: bytes) -> tuple[bool, bytes]:
            return self.answering.answer(unit)

    return Worker
