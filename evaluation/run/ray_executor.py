"""The engine `ray`: Ray Data spreads units of work over actors, one a device, each with a model of its own.

Ray asks a unit again whose process died. A ledger counts how often each was begun, so that one that kills every process
is given up instead of being asked for ever. Knows nothing of the units. Ray is imported when an engine is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bridge_stg.evaluation.run.executor import Lost, Opener
from bridge_stg.runtime.errors import EngineError

ATTEMPTS = 2
"""How often a unit is begun before it is given up: a process may also die for a reason that is not the unit's."""
OBJECT_STORE_BYTES = 2**28
"""Units and answers are small; Ray's default, 30 % of the memory, is better left to the models."""
LONGEST_TEMPORARY = 24
"""Characters of the folder for temporary files beyond which the paths of Ray's sockets in it are too long (103)."""


@dataclass(frozen=True)
class RayEngine:
    """Answers units on Ray.

    Attributes:
        workers: how many actors there are; each opens the model once.
        threads: CPU threads that each model should use.
        resources: what Ray reserves for each: `num_gpus`, or `num_cpus`.
    """

    workers: int
    threads: int
    resources: dict[str, float]

    def answers(
        self, open_model: Opener, ask: Callable[[Any, Any], Any], units: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """See `bridge_stg.evaluation.run.executor.Engine.answers`.

        Raises:
            EngineError: the processes that load the model die, or Ray fails.
        """
        import ray
        import ray.data
        from ray import cloudpickle
        from ray.exceptions import RayError

        if not units:
            return
        worker, ledger_class = _travelling_classes()
        ledger = ray.remote(num_cpus=0)(ledger_class).remote()
        stored = ray.put([cloudpickle.dumps(unit) for unit in units])
        job = cloudpickle.dumps(Job(open_model, ask, self.workers, self.threads))
        # A block a unit: what is finished comes back at once, and a process that dies takes no other unit with it.
        places = ray.data.from_items(list(range(len(units))), override_num_blocks=len(units))
        answered = places.map(
            worker,
            fn_constructor_args=(_import_paths(), job, [stored], ledger),
            compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(units))),
            **self.resources,
        )
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
            raise EngineError(f"Ray failed: {type(error).__name__}: {_first_line(error)}") from error
        finally:
            if ray.is_initialized():  # else it is gone, and the call would start a Ray
                ray.kill(ledger)
        for place in sorted(left):
            yield place, Lost("EngineError: Ray returned no answer")


@contextmanager
def ray_engine(*, workers: int | None = None, threads: int | None = None) -> Iterator[RayEngine]:
    """Open an engine: on a Ray that this program started, on the cluster at RAY_ADDRESS, else on a local one.

    The local one lives as long as the context; it has no dashboard, sends no statistics, and keeps its files in a
    temporary folder. On a cluster, this package, the model and the media must lie on every node, at the same
    absolute paths.

    Args:
        workers: how many actors; 1 by default. Where there are GPUs there is one a GPU, and this is the most.
        threads: CPU threads of each; by default they share the CPUs.

    Raises:
        EngineError: Ray cannot be started or reached.
        ImportError: Ray or pyarrow is missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import pyarrow  # noqa: F401 - Ray Data needs it; without this line its error would not name it
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            _start(stack, workers)
        yield _engine(workers, threads)


def _start(stack: contextlib.ExitStack, workers: int | None) -> None:
    """Connect to the cluster at RAY_ADDRESS or start a local Ray; the stack ends what was begun."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        base = tempfile.gettempdir()
        base = "/tmp" if len(base) > LONGEST_TEMPORARY and os.path.isdir("/tmp") else base
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir=base, ignore_cleanup_errors=True)
        options |= {
            "num_cpus": max(_cpus(), workers or 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": stack.enter_context(folder),
        }
    stack.callback(ray.shutdown)
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(f"Ray could not be started: {_first_line(error)}. --engine local needs none.") from error


def _engine(workers: int | None, threads: int | None) -> RayEngine:
    """Share out what Ray has: an actor a GPU, or `workers` actors; no share is larger than the smallest node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = sum(node["CPU"] for node in nodes)
    count = min(gpus, workers or gpus) if gpus else workers or 1
    share = min([cpus / count, *(node["CPU"] for node in nodes)])
    whole = max(1, int(share))
    return RayEngine(count, threads or whole, {"num_gpus": 1} if gpus else {"num_cpus": min(share, whole)})


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@dataclass(frozen=True)
class Job:
    """What every actor does: open a model and ask it. `workers` and `threads` are those of the engine."""

    open_model: Opener
    ask: Callable[[Any, Any], Any]
    workers: int
    threads: int


class Answering:
    """The inside of an actor. It opens its model at its first unit, where a failure can be reported.

    Args:
        job: what to do, pickled.
        units: a list of one reference to the pickled units.
        ledger: the actor that counts.
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
        except Exception as error:  # Ray would wrap it in a text; the caller is to see it as it was raised
            return {"place": place, "raised": True, "value": _pickled_error(error)}

    def _answer(self, place: int) -> Any:
        import ray
        from ray import cloudpickle

        if self._model is None:
            begun, opened = ray.get(self._ledger.opening.remote())
            if not opened and begun > ATTEMPTS * self._job.workers:
                raise EngineError(
                    f"{begun - 1} worker processes died while they loaded the model, perhaps for want of memory. Give "
                    "fewer --workers, or try --engine local."
                )
            self._model = self._open.enter_context(self._job.open_model())
            ray.get(self._ledger.opened.remote())
        if ray.get(self._ledger.begin.remote(place)) > ATTEMPTS:
            return Lost(
                f"EngineError: the worker process died {ATTEMPTS} times while it answered this, perhaps for want of "
                "memory"
            )
        return self._job.ask(self._model, cloudpickle.loads(self._units[place]))


def _pickled_error(error: Exception) -> bytes:
    from ray import cloudpickle

    try:
        data = cloudpickle.dumps(error)
        cloudpickle.loads(data)
    except Exception:  # some exceptions cannot be made again from their arguments
        data = cloudpickle.dumps(EngineError(f"{type(error).__name__}: {error}"))
    return data


def _import_paths() -> dict[str, list[str]]:
    """Return where this process finds modules; from a checkout, no other process would find this package."""
    return {
        "modules": [path or os.getcwd() for path in sys.path],
        "cwd": [os.getcwd()],
    }


def _travelling_classes() -> tuple[type, type]:
    """Return the classes that actors are made of.

    They are made in a function, since such classes travel by value: until `Worker` has set up its process, nothing of
    this package can be imported there.
    """

    class Worker:
        def __init__(self, paths: dict[str, list[str]], job: bytes, units: list[Any], ledger: Any) -> None:
            import os
            import sys

            if os.path.isdir(paths["cwd"][0]):
                os.chdir(paths["cwd"][0])  # media may be named by relative paths
            sys.path += [path for path in paths["modules"] if path not in sys.path]
            from bridge_stg.evaluation.run.ray_executor import Answering

            self.inside = Answering(job, units, ledger)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return self.inside.answer(int(row["item"]))

    class Ledger:
        def __init__(self) -> None:
            self.begun: dict[int, int] = {}
            self.models = [0, 0]

        def begin(self, place: int) -> int:
            self.begun[place] = self.begun.get(place, 0) + 1
            return self.begun[place]

        def opening(self) -> tuple[int, int]:
            self.models[0] += 1
            return self.models[0], self.models[1]

        def opened(self) -> None:
            self.models[1] += 1

    return Worker, Ledger
