"""Who answers many questions: this process, or an engine that spreads them over devices.

An engine is given a model to open, a function `ask(model, unit)`, and units of work; it returns what that function
returns. Knows nothing of questions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from bridge_stg.runtime.errors import BridgeError

ENGINES = ("local", "ray")
Opener = Callable[[], AbstractContextManager[Any]]
"""Opens a model; the value of the context is what `ask` is given."""


@dataclass(frozen=True)
class Lost:
    """Stands in for the answer to a unit that could not be brought back, such as one that kills its process."""

    error: str


class Engine(Protocol):
    """Answers units of work."""

    @property
    def threads(self) -> int | None:
        """CPU threads that each model should use; None for its own default."""
        ...

    def answers(
        self, open_model: Opener, ask: Callable[[Any, Any], Any], units: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (place in `units`, what `ask` returned or `Lost`) in the order in which units are finished.

        What `ask` or the opening of the model raises ends the whole, so `ask` must return failures of single units.
        """
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Answers one unit after the other in this process."""

    threads: int | None = None

    def answers(
        self, open_model: Opener, ask: Callable[[Any, Any], Any], units: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """See `Engine.answers`; units are answered in their order."""
        with open_model() as model:
            for place, unit in enumerate(units):
                yield place, ask(model, unit)


def open_engine(name: str, *, workers: int | None = None, threads: int | None = None) -> AbstractContextManager[Engine]:
    """Return a context manager of an engine; leaving it ends the engine's processes.

    Args:
        name: one of `ENGINES`.
        workers: how many models the engine loads; see `ray_engine`. The local engine has one.
        threads: CPU threads of each; None: the engine shares out the machine's.

    Raises:
        BridgeError: the engine is unknown, or `workers` was given to one that has one only.
        ImportError: the engine's package is missing.
    """
    if name not in ENGINES:
        raise BridgeError(f"the engine {name!r} is unknown; known: {', '.join(ENGINES)}.")
    if name == "local":
        if workers is not None:
            raise BridgeError("--workers was given, but the engine 'local' has one; add --engine ray.")
        return contextlib.nullcontext(LocalEngine(threads))
    from bridge_stg.evaluation.run.ray_executor import ray_engine

    return ray_engine(workers=workers, threads=threads)
