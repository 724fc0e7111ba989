"""Executors: run many units of work on a model, in this process or spread over devices. Knows nothing of samples."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from bridge_stg.runtime.errors import BridgeError

Opener = Callable[[], AbstractContextManager[Any]]
"""Opens a model; the value of the context is the first argument of the function that answers units."""
Answers = Generator[tuple[int, Any], None, None]
"""Pairs of (index of the unit, its result or `Lost`) in the order in which units are finished."""


@dataclass(frozen=True)
class Lost:
    """Marks a result that could not be computed, such as that of a unit that kills its process."""

    error: str


class Executor(Protocol):
    """Runs units of work."""

    @property
    def threads(self) -> int | None:
        """CPU threads that each model should use; None for its own default."""
        ...

    def answers(self, open_model: Opener, answer: Callable[[Any, Any], Any], units: Sequence[Any]) -> Answers:
        """Yield the index and `answer(model, unit)` of each unit.

        An exception of `answer`, or from opening the model, ends the run, so `answer` must return failures of units.
        """
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """Runs one unit after the other in this process."""

    threads: int | None = None

    def answers(self, open_model: Opener, answer: Callable[[Any, Any], Any], units: Sequence[Any]) -> Answers:
        """Yield the results in the order of the units; see `Executor.answers`."""
        with open_model() as model:
            for place, unit in enumerate(units):
                yield place, answer(model, unit)


def open_executor(
    name: str, *, workers: int | None = None, threads: int | None = None
) -> AbstractContextManager[Executor]:
    """Return a context manager of an executor; leaving it ends the executor's processes.

    Args:
        name: `local` or `ray`.
        workers: number of models that `ray` loads; the local executor has one.
        threads: CPU threads of each model; None: the executor divides those of the machine.

    Raises:
        BridgeError: the executor is unknown, or `workers` was given to `local`.
        ImportError: the executor's package is missing.
    """
    if name == "ray":
        module = importlib.import_module("bridge_stg.evaluation.run.ray_executor")  # by name, since it imports this one
        executor: AbstractContextManager[Executor] = module.ray_executor(workers=workers, threads=threads)
        return executor
    if name != "local":
        raise BridgeError("options.invalid", f"the executor {name!r} is unknown; known: local, ray.")
    if workers is not None:
        raise BridgeError("options.conflict", "--workers was given, but 'local' has one; add --executor ray.")
    return contextlib.nullcontext(LocalExecutor(threads))
