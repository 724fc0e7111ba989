"""Work in threads beside the caller's: results, errors, order."""

from __future__ import annotations

import threading

import pytest

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.threads import UseCount, for_each, in_background
from tests.errors import raises


def test_a_result_is_waited_for_and_an_error_is_raised_by_who_asks() -> None:
    go = threading.Event()
    background = in_background(lambda: go.wait(5) and threading.current_thread().name)
    go.set()
    assert background.result() == background.result() != threading.current_thread().name
    failed = in_background(lambda: 1 / 0)
    failed.exception()
    with pytest.raises(ZeroDivisionError):
        failed.result()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_worked_on_once_at_the_same_time(threads: int) -> None:
    meet = threading.Barrier(threads)
    seen: list[int] = []

    def work(item: int) -> None:
        if item < threads:
            meet.wait(5)  # breaks if fewer threads work
        seen.append(item)

    for_each(work, range(20), threads=threads)
    assert sorted(seen) == list(range(20))
    for_each(work, [], threads=threads)


def test_the_first_error_in_the_order_of_items_is_raised() -> None:
    meet = threading.Barrier(2)

    def work(item: int) -> None:
        meet.wait(5)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        for_each(work, range(2), threads=2)
    done: list[int] = []
    with pytest.raises(ZeroDivisionError):
        for_each(lambda item: done.append(item) if item < 3 else 1 / 0, range(10), threads=1)
    assert done == [0, 1, 2]


def test_the_last_user_frees() -> None:
    freed: list[int] = []
    usage = UseCount(lambda: freed.append(1), closed_error=VideoError("video.closed", "this video is closed"))
    with usage.call():
        with usage.call():
            usage.close()
        assert not freed
        with raises("video.closed", kind=VideoError):
            with usage.call():
                pass
    usage.close()
    assert freed == [1]
