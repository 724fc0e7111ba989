"""The executor `ray`: Ray Data spreads units of work over actors, one per device, each with its own model.

Ray runs a unit again if its process died. A ledger counts how often each was started, so that a unit that kills every
process is given up. Knows nothing of the units. Ray is imported when an executor is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
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
"""Units and answers are small; Ray's default is 30 % of the memory, which the models need."""
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
        import ray
        import ray.data
        from ray import cloudpickle
        from ray.exceptions import RayError

        if not units:
            return
        worker, ledger_class = _actor_classes()
        ledger = ray.remote(num_cpus=0)(ledger_class).remote()
        stored = ray.put([cloudpickle.dumps(unit) for unit in units])
        job = cloudpickle.dumps(Job(open_model, answer, self.workers, self.threads))
        paths = {"modules": [path or os.getcwd() for path in sys.path], "cwd": [os.getcwd()]}  # for the actors' imports
        # One block per unit: its result comes back at once, and a process that dies loses no other unit.
        places = ray.data.from_items(list(range(len(units))), override_num_blocks=len(units))
        answered = places.map(
            worker, fn_constructor_args=(paths, job, [stored], ledger),
            compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(units))), **self.resources,
        )  # fmt: skip
        left = set(range(len(units)))
        try:
            for block in answered.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                for row in block.to_pylist():
                    value = cloudpickle.loads(row["value"])
                    if row["raised"]:
                        raise value
                    left.discard(row["place"])
                    yield row["place"], value
        except RayError as error:
            message = f"Ray failed: {type(error).__name__}: {_first_line(error)}"
            raise EngineError("evaluation.executor_failed", message) from error
        finally:
            if ray.is_initialized():  # otherwise this call would start a new Ray
                ray.kill(ledger)
        for place in sorted(left):
            yield place, Lost("EngineError: Ray returned no answer")


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
        ImportError: Ray or pyarrow is missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import pyarrow  # noqa: F401 - Ray Data needs it, but its own error would not name it
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
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
    """The work of every actor; `workers` and `threads` are those of the executor."""

    open_model: Opener
    answer: Callable[[Any, Any], Any]
    workers: int
    threads: int


class Answering:
    """The state of an actor. It opens its model for its first unit, when a failure can be reported.

    `job` is the pickled `Job`, `units` a list of one reference to the pickled units, `ledger` the actor that counts.
    """

    def __init__(self, job: bytes, units: list[Any], ledger: Any) -> None:
        import ray
        from ray import cloudpickle

        self._job: Job = cloudpickle.loads(job)
        self._units: list[bytes] = ray.get(units[0])
        self._ledger = ledger
        self._model: Any = None
        self._open = contextlib.ExitStack()
        os.environ["OMP_NUM_THREADS"] = str(self._job.threads)  # torch reads it when it is imported

    def answer(self, place: int) -> dict[str, Any]:
        """Return a row of plain values: `place`, the pickled `value`, and whether that is an exception to `raise`."""
        from ray import cloudpickle

        try:
            return {"place": place, "raised": False, "value": cloudpickle.dumps(self._answer(place))}
        except Exception as error:  # noqa: BLE001 - Ray would wrap it; the caller raises it as it is
            return {"place": place, "raised": True, "value": _pickled_error(error)}

    def _answer(self, place: int) -> Any:
        import ray
        from ray import cloudpickle

        if self._model is None:
            started, opened = ray.get(self._ledger.opening.remote())
            if not opened and started > ATTEMPTS * self._job.workers:
                what = f"{started - 1} worker processes died while they loaded the model, probably out of memory"
                raise EngineError("evaluation.worker_died", f"{what}; give fewer --workers.")
            self._model = self._open.enter_context(self._job.open_model())
            ray.get(self._ledger.opened.remote())
        if ray.get(self._ledger.start.remote(place)) > ATTEMPTS:
            return Lost(f"EngineError: the worker process died {ATTEMPTS} times at this, perhaps for lack of memory")
        return self._job.answer(self._model, cloudpickle.loads(self._units[place]))


def _pickled_error(error: Exception) -> bytes:
    from ray import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(data)
    except Exception:  # noqa: BLE001 - an exception that cannot be unpickled may raise anything
        data = cloudpickle.dumps(EngineError("evaluation.executor_failed", f"{type(error).__name__}: {error}"))
    return data


def _actor_classes() -> tuple[type, type]:
    """Return the classes of the actors.

    Classes of a function are pickled by value: until `Worker` has set up its process, this package cannot be imported
    there.
    """

    class Worker:
        def __init__(self, paths: dict[str, list[str]], job: bytes, units: list[Any], ledger: Any) -> None:
            import os
            import sys

            if os.path.isdir(paths["cwd"][0]):
                os.chdir(paths["cwd"][0])  # media may be named by relative paths
            sys.path += [path for path in paths["modules"] if path not in sys.path]
            from bridge_stg.evaluation.run.ray_executor import Answering

            self.answering = Answering(job, units, ledger)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return self.answering.answer(int(row["item"]))

    class Ledger:
        def __init__(self) -> None:
            self.started: dict[int, int] = {}
            self.models = [0, 0]

        def start(self, place: int) -> int:
            self.started[place] = self.started.get(place, 0) + 1
            return self.started[place]

        def opening(self) -> tuple[int, int]:
            self.models[0] += 1
            return self.models[0], self.models[1]

        def opened(self) -> None:
            self.models[1] += 1

    return Worker, Ledger
