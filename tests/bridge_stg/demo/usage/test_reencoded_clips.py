"""A clip is answered alike in whichever way a phone or a camera stores it, and a process that answers stays small."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.results import Grounding
from tests.conftest import ROOT
from tests.fakes.clips import decoded, write_hdr

CLIP, QUERY = Path(ROOT) / "assets" / "demo" / "clips" / "2-moving.mp4", "the white dog"
RATE = 8


def hdr(transfer: str) -> Callable[[Path, Sequence[np.ndarray]], Path]:
    return lambda folder, frames: write_hdr(folder / "clip.mp4", frames, transfer, rate=RATE)


def stretched(size: tuple[int, int], aspect: Fraction) -> Callable[[Path, Sequence[np.ndarray]], Path]:
    def write(folder: Path, frames: Sequence[np.ndarray]) -> Path:
        with av.open(str(folder / "clip.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=RATE, options={"crf": "14"})
            (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
            stream.codec_context.sample_aspect_ratio = aspect
            for index, rgb in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.array(Image.fromarray(rgb).resize(size)), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, RATE)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        return folder / "clip.mp4"

    return write


def motion_jpeg(folder: Path, frames: Sequence[np.ndarray]) -> Path:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    with av.open(str(folder / "clip.avi"), "w") as file:
        stream = file.add_stream("mjpeg", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuvj420p"
        for index, rgb in enumerate(frames):
            data = io.BytesIO()
            Image.fromarray(rgb).save(data, "JPEG", quality=95, exif=exif)
            packet = av.Packet(data.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, RATE)
            packet.is_keyframe = True
            file.mux(packet)
    return folder / "clip.avi"


WAYS = {
    "HLG": hdr("hlg"),
    "PQ": hdr("pq"),
    "SAR 2:1": stretched((240, 360), Fraction(2)),
    "SAR 1:2": stretched((480, 180), Fraction(1, 2)),
    "SAR 8:9": stretched((540, 360), Fraction(8, 9)),
    "MJPEG with EXIF": motion_jpeg,
}


@pytest.fixture(scope="module")
def grounder(demo_bundle: Path) -> Grounder:
    return Grounder.load(demo_bundle)


@pytest.fixture(scope="module")
def original(grounder: Grounder) -> Grounding:
    return grounder.ground(CLIP, QUERY)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = sides.clip(0).prod(axis=1)
    return shared / ((a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - shared)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_answer_is_that_of_the_original(way: str, grounder: Grounder, original: Grounding, tmp_path: Path) -> None:
    answer = grounder.ground(WAYS[way](tmp_path, decoded(CLIP)[0]), QUERY)
    assert answer.span is not None and original.span is not None
    assert answer.tube is not None and original.tube is not None
    np.testing.assert_allclose(answer.span, original.span, atol=1 / RATE)
    scale = np.tile(np.divide(original.size, answer.size), 2)
    assert overlap(answer.tube.boxes * scale, original.tube.at(answer.tube.times).boxes).mean() >= 0.97


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_hundred_calls_from_eight_threads_leave_nothing(exported: Bundle) -> None:
    grounder = Grounder.load(exported.path)
    threads, memory, calls = len(os.listdir("/proc/self/task")), [], iter(range(100))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if next(calls, None) is None:
                    return
            grounder.ground(CLIP, QUERY)
            with lock:
                memory.append(resident_bytes())

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(memory) == 100
    assert len(os.listdir("/proc/self/task")) <= threads + 20
    assert resident_bytes() <= 1.05 * memory[9] and np.median(memory[-20:]) <= 1.05 * max(memory[:20])
