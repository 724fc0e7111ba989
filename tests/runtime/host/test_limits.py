from __future__ import annotations

import threading
import time

import pytest

from bridge_stg.runtime.errors import Interrupted
from bridge_stg.runtime.host.limits import Limits
from tests.errors import raises


def test_a_deadline_names_the_stage() -> None:
    limits = Limits(deadline_s=0.02)
    with limits.stage("prefill"):
        time.sleep(0.03)
        with raises("call.deadline", "0.02", "prefill", kind=Interrupted):
            limits.check()


@pytest.mark.parametrize("deadline", [float("nan"), "3", [1], True, 10**400])
def test_a_deadline_that_is_no_number(deadline: object) -> None:
    with raises("options.out_of_range", repr(deadline)):
        Limits(deadline_s=deadline)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["event", "callable"])
def test_cancel_by_event_or_callable(kind: str) -> None:
    event = threading.Event()
    limits = Limits(cancel=event if kind == "event" else event.is_set)
    limits.check()
    event.set()
    with raises("call.cancelled", "answer", kind=Interrupted):
        with limits.stage("answer"):
            raise AssertionError("the stage must not begin")


def test_cancel_of_another_type_is_rejected() -> None:
    with pytest.raises(TypeError, match="int"):
        Limits(cancel=3)


def test_progress_is_told_the_stage() -> None:
    told = []
    limits = Limits(progress=lambda *values: told.append(values))
    with limits.stage("spatial"):
        limits.report(1, 2)
        limits.report(2, None)
    assert told == [("spatial", 1, 2), ("spatial", 2, None)]


def test_stages_add_up_and_an_inner_stage_is_not_counted_twice() -> None:
    limits = Limits()
    for _ in range(2):
        with limits.stage("outer"):
            with limits.stage("inner"):
                time.sleep(0.02)
    assert limits.timings["inner"] >= 0.04
    assert limits.timings["outer"] < 0.02
    assert sum(limits.timings.values()) <= limits.elapsed_s


def test_waiting_for_a_lock_stops_at_the_deadline() -> None:
    lock = threading.Lock()
    with lock, pytest.raises(Interrupted):
        with Limits(deadline_s=0.05).hold(lock):
            raise AssertionError("the lock is taken")
    with Limits().hold(lock):
        assert lock.locked()
    assert not lock.locked()
