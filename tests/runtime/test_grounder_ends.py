"""Calls that are cancelled, late or under way while things close, and many threads at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.runtime.errors import EngineError, Interrupted, VideoError
from tests.errors import raises
from tests.fakes.answers import QUERIES, SCRIPT, same, write_video
from tests.fakes.chain import clip, fake_grounder

STAGES = ["decode_video", "vision_coarse", "prefill", "answer", "decode_fine", "vision_fine", "spatial"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_cancelled_call_names_the_stage(stage: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", clip())
    grounder = fake_grounder(script=SCRIPT)
    reached: list[str] = []
    event = threading.Event()

    def progress(name: str, done: float, total: float | None) -> None:
        reached.append(name)
        if name == stage:
            event.set()

    with raises("call.cancelled", stage, kind=Interrupted):
        grounder.ground(path, "the car", cancel=event, progress=progress)
    assert reached[-1] == stage
    event.clear()
    same(grounder.ground(path, "the car"), fake_grounder(script=SCRIPT).ground(path, "the car"))


def test_an_opened_video_survives_a_cancelled_call(tmp_path: Path) -> None:
    with fake_grounder(script=SCRIPT).open(write_video(tmp_path / "clip.mp4", clip())) as video:
        for calls in range(1, 400, 5):
            left = iter(range(calls))
            try:
                result = video.ground("the car", cancel=lambda left=left: next(left, None) is None)
            except Interrupted:
                continue
            same(result, fake_grounder(script=SCRIPT).ground(tmp_path / "clip.mp4", "the car"))
            break
        else:
            raise AssertionError("the call was always interrupted")
        assert calls > 40  # every decoded frame and every step asks


def test_deadlines_on_every_call() -> None:
    grounder = fake_grounder(script=SCRIPT)
    for call in (lambda: grounder.ground(clip(), "the car", deadline_s=0), lambda: grounder.open(clip(), deadline_s=0)):
        with raises("call.deadline", "decode_video", kind=Interrupted):
            call()
    with grounder.open(clip()) as video:
        with raises("call.deadline", "answer", kind=Interrupted):
            video.ground_many(["the car"], deadline_s=0)


def test_closed_objects_raise() -> None:
    grounder = fake_grounder(script=SCRIPT)
    video, other = grounder.open(clip()), grounder.open(clip())
    video.close()
    video.close()
    with raises("video.closed", kind=VideoError):
        video.ground("the car")
    grounder.close()
    grounder.close()
    for call in (
        lambda: grounder.ground(clip(), "the car"),
        lambda: grounder.open(clip()),
        lambda: other.ground("the car"),
    ):
        with raises("engine.closed", kind=EngineError):
            call()
    other.close()
    assert all(session.closed for session in grounder.sessions.values())  # type: ignore[attr-defined]


def test_closing_waits_for_the_call_under_way() -> None:
    grounder = fake_grounder(script=SCRIPT)
    spatial: Any = grounder.sessions["spatial_decoder"]
    inside, go_on = threading.Event(), threading.Event()

    def wait(feeds: Any) -> None:
        inside.set()
        assert go_on.wait(5)

    spatial.before = wait
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(grounder.ground, clip(), "the car")
        assert inside.wait(5)
        grounder.close()
        assert not spatial.closed
        go_on.set()
        assert running.result(5).found
    assert spatial.closed


def test_many_threads_on_one_video_and_one_grounder(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", clip())
    alone = {query: fake_grounder(script=SCRIPT).ground(path, query) for query in QUERIES}
    grounder = fake_grounder(script=SCRIPT, feature_budget_bytes=4000)
    encoder: Any = grounder.sessions["vision_encoder"]
    encoder.before = lambda feeds: time.sleep(0.001)
    with grounder.open(path) as video, ThreadPoolExecutor(6) as threads:
        tasks = [(query, threads.submit(video.ground, query)) for query in QUERIES * 3]
        tasks += [(query, threads.submit(grounder.ground, path, query)) for query in QUERIES]
        for query, task in tasks:
            same(task.result(30), alone[query])
