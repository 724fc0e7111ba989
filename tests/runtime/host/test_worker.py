"""Methods of an object in a subprocess: results, errors, progress, cancelling, and limits of memory and time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime.errors import Interrupted, VideoError
from bridge_stg.runtime.host import worker as module
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.worker import ENDED, Worker
from tests.errors import raises

MEMORY = 2**28


class Target:
    """The object in the subprocess."""

    def __init__(self, name: str) -> None:
        self.name = name

    def echo(self, _: Limits, *values: Any) -> Any:
        return [self.name, *values]

    def process(self, _: Limits) -> int:
        return os.getpid()

    def fail(self, _: Limits, kind: str) -> None:
        if kind == "video":
            raise VideoError("video.damaged", "torn")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            os._exit(3)
        raise ZeroDivisionError(kind)

    def allocate(self, _: Limits, size: int) -> int:
        return int(np.ones(size, np.uint8).sum(dtype=np.int64))

    def count(self, limits: Limits, most: int) -> int:
        for done in range(most):
            limits.report(done, most)
            time.sleep(0.001)
        return most

    def hang(self, _: Limits) -> None:
        time.sleep(600)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(f"{__name__}:Target", "abc", memory_bytes=MEMORY)
    yield made
    made.close()


def test_results_are_json_values_and_arrays(worker: Worker) -> None:
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 3), np.uint8), np.array(3)]
    name, number, first, (nested, empty), scalar = worker.call("echo", 1.5, arrays[0].T, [b"abc", arrays[1]], arrays[2])
    assert (name, number) == ("abc", 1.5) and first.dtype == np.float32 and scalar == 3 and scalar.shape == ()
    np.testing.assert_array_equal(first, arrays[0].T)
    assert bytes(nested) == b"abc" and empty.shape == (0, 3)


def test_errors_of_the_object_are_raised_here_and_it_goes_on(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    with raises("video.damaged", "torn") as caught:
        worker.call("fail", "video")
    assert type(caught.value) is VideoError
    with raises(ENDED, "ZeroDivisionError"):
        worker.call("fail", "other")
    assert worker.call("echo") == ["abc"] and not worker.ended


@pytest.mark.parametrize("kind", ["killed", "exit"])
def test_a_dead_worker_is_an_error(worker: Worker, kind: str) -> None:
    with raises(ENDED):
        worker.call("fail", kind)
    assert worker.ended
    with raises(ENDED):
        worker.call("echo")


def test_memory_is_limited(worker: Worker) -> None:
    assert worker.call("allocate", MEMORY // 2) == MEMORY // 2
    with raises(ENDED, "memory"):
        worker.call("allocate", 2 * MEMORY)
    assert worker.call("allocate", MEMORY // 2) == MEMORY // 2


def test_progress_is_reported_and_a_cancelled_worker_takes_the_next_call(worker: Worker) -> None:
    seen: list[float] = []
    limits = Limits(progress=lambda stage, done, total: seen.append(done))
    assert worker.call("count", 20, limits=limits) == 20 and seen == list(range(20))
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    with raises("call.cancelled") as caught:
        worker.call("count", 100_000, limits=Limits(cancel=stop))
    assert type(caught.value) is Interrupted and not worker.ended
    assert worker.call("count", 3) == 3


def test_a_hanging_call_ends_the_worker(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    monkeypatch.setattr(module, "CALL_S", 0.2)
    process = worker.call("process")
    with raises(ENDED, "0.2 s"):
        worker.call("hang")
    assert worker.ended and _ends(process)


def test_a_worker_ends_when_it_is_closed_and_another_template_follows_a_killed_one(worker: Worker) -> None:
    process = worker.call("process")
    worker.close()
    assert _ends(process)
    running = module.TEMPLATE._running  # noqa: SLF001
    assert running is not None
    running[0].kill()
    running[0].wait()
    again = Worker(f"{__name__}:Target", "abc", memory_bytes=MEMORY)
    assert again.call("echo") == ["abc"]
    again.close()


def _ends(process: int) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False
