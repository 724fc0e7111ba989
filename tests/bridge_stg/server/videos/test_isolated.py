"""Videos read in subprocesses: the same frames, bit for bit, and another process after one that ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host import worker
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.video.token_budget import Budget
from bridge_stg.server.settings import Settings
from bridge_stg.server.videos import isolated
from bridge_stg.server.videos.isolated import IsolatedMedia
from tests.bridge_stg.server.conftest import Running, answer_of, ask, ended, http_error, small_clip, upload
from tests.errors import raises
from tests.fakes.chain import fake_grounder
from tests.fakes.clips import GOP, SPEC, pictures, write

MIB = 2**20


def media(path: Path, **settings: Any) -> IsolatedMedia:
    return IsolatedMedia(str(path), Settings(**settings).media_limits)


def clip(path: Path, kind: str) -> Path:
    images = [Image.fromarray(picture) for picture in pictures(30)]
    if kind == "still.png":
        images[0].save(path / kind)
    elif kind == "animation.gif":
        images[0].save(path / kind, save_all=True, append_images=images[1:], duration=[100] * 29 + [900])
    elif kind == "slow.mp4":
        return write(path / kind, pictures(3), rate=1, options={"x264-params": GOP})
    else:
        return write(path / kind, pictures(100), rate=8, options={"x264-params": GOP})
    return path / kind


@pytest.mark.parametrize("kind", ["long.mp4", "slow.mp4"])
def test_a_search_reads_the_same_frames_and_may_read_the_last_ones_late(kind: str, tmp_path: Path) -> None:
    path = clip(tmp_path, kind)
    source = media(path).live(100.0)
    with play(path) as here:
        frames = [(time_s, picture()) for time_s, picture in here.pictures]
    there = list(source.frames(threading.Event()))
    assert [time_s for time_s, _ in there] == [time_s for time_s, _ in frames]
    for (_, picture), (_, expected) in zip(there[-2:], frames[-2:], strict=True):
        np.testing.assert_array_equal(picture(), expected)


@pytest.mark.parametrize("kind", ["long.mp4", "long.avi", "slow.mp4", "animation.gif", "still.png"])
@pytest.mark.parametrize(
    "budget",
    [Budget(64), Budget(12), Budget(None, 200, text_positions=lambda times: 100 + 3 * len(times))],
    ids=["64", "12", "positions"],
)
def test_frames_are_those_of_this_process(kind: str, budget: Budget, tmp_path: Path) -> None:
    path = clip(tmp_path, kind)
    with open_source(str(path), SPEC, budget=budget) as here, open_source(media(path), SPEC, budget=budget) as there:
        seen: list[tuple[float, float | None]] = []
        report = Limits(progress=lambda stage, done, total: seen.append((done, total)))
        ours, theirs = here.coarse(), there.coarse(report)
        assert ours.choice == theirs.choice and ours.duration_s == theirs.duration_s
        assert (ours.interval_s, here.width, here.height, here.fine_size) == (
            theirs.interval_s, there.width, there.height, there.fine_size,
        )  # fmt: skip
        np.testing.assert_array_equal(ours.frames, theirs.frames)
        np.testing.assert_array_equal(ours.times, theirs.times)
        np.testing.assert_array_equal(here.frame_times, there.frame_times)
        np.testing.assert_array_equal(here.fine_grid(), there.fine_grid())
        assert (here.is_image, here.read_ahead, here.clock) == (there.is_image, there.read_ahead, there.clock)
        assert here.clock == ("frame_rate" if kind == "long.avi" else "timestamps")
        assert len(seen) == (0 if here.is_image else len(here.frame_times) - (not here.read_ahead))
        for times in (here.fine_grid()[::-1], np.random.default_rng(0).uniform(0, 15, 20)):
            ours_fine, theirs_fine = here.fine(times), there.fine(times)
            np.testing.assert_array_equal(ours_fine.frames, theirs_fine.frames)
            np.testing.assert_array_equal(ours_fine.times, theirs_fine.times)


@pytest.mark.parametrize("kind", ["slow.mp4", "animation.gif", "still.png"])
def test_every_frame_is_played(kind: str, tmp_path: Path) -> None:
    path = clip(tmp_path, kind)
    with play(str(path)) as here, media(path).play() as there:
        assert (here.duration_s, here.is_image) == (there.duration_s, there.is_image)
        ours, theirs = list(here.frames), list(there.frames)
        assert here.last_end_s() == there.last_end_s()
    assert [time for time, _ in ours] == [time for time, _ in theirs]
    np.testing.assert_array_equal(np.stack([frame for _, frame in ours]), np.stack([frame for _, frame in theirs]))


def test_an_open_video_goes_on_after_its_process_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[worker.Worker] = []

    class Kept(worker.Worker):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(isolated, "Worker", Kept)
    path = clip(tmp_path, "long.mp4")
    with open_source(str(path), SPEC) as here, open_source(media(path), SPEC) as there:
        there.coarse()
        os.kill(made[0].process_id, signal.SIGKILL)
        with raises("video.decoder_failed"):
            there.fine([1.0])
        np.testing.assert_array_equal(here.fine([1.0, 7.5]).frames, there.fine([1.0, 7.5]).frames)
        assert len(made) == 2
    with raises("video.closed"):
        there.fine([1.0])


def test_a_video_that_needs_too_much_memory_fails_alone(served: Callable[..., Running], tmp_path: Path) -> None:
    large, small = tmp_path / "large.png", small_clip(tmp_path / "small.mp4")
    Image.new("1", (10000, 10000)).save(large)
    running = served(decode_bytes=384 * MIB, max_pixels=10**8)
    with running.client() as client:
        answer = client.post("/v1/videos", files={"file": large.read_bytes()})
        assert http_error(answer) == (422, "video.decoder_failed"), answer.text
        job = ended(client, ask(client, upload(client, small)["id"], ["the car"]).json()["id"])
    assert [answer_of(one) for one in job["results"]] == [answer_of(fake_grounder().ground(small, "the car"))]


def test_a_machine_without_room_for_a_process_is_no_fault_of_the_video(
    served: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(module: str) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    path = small_clip(tmp_path / "a.mp4")
    with served().client() as client:
        with monkeypatch.context() as patched:
            patched.setattr(worker.TEMPLATE, "start", refuse)
            answer = client.post("/v1/videos", files={"file": path.read_bytes()})
            assert http_error(answer) == (503, "host.subprocess_failed") and answer.headers["retry-after"]
            with pytest.raises(EngineError):
                media(path).probe("a.mp4")
        upload(client, path)
