"""The whole chain of the demo model on a pretended GPU: what passes between graphs stays there, and nothing changes."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from bridge_stg.demo.held_out import clip_path, held_out_clips
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.backends.tensorrt.engine_cache import read_engines
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.parity.verify import verify_bundle
from tests.errors import raises
from tests.fakes.clips import to_rgb
from tests.fakes.machine import CHAIN_PROFILES, FakeMachine

SCHEDULES = {"late": (), "uploads hurry": (1,), "work hurries": (0,)}


@pytest.fixture
def clip(tmp_path):
    clip = next(iter(held_out_clips(1)))
    texts = [q.text for q in (clip.named, clip.other, clip.absent) if q is not None]
    return clip_path(clip, tmp_path), texts


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_the_chain_on_the_device_equals_the_chain_on_the_cpu(  # noqa: PLR0917 - fixtures
    demo_bundle, clip, tmp_path, monkeypatch, variant, schedule
):
    path, texts = clip
    with Grounder.load(demo_bundle, backend="onnxruntime", variant=variant, threads=1) as grounder:
        with grounder.open(path) as video:
            expected = video.ground_many(texts)
    machine = FakeMachine(monkeypatch, tmp_path / "cache", family="tensorrt", eager=SCHEDULES[schedule])
    machine.build(Bundle.load(demo_bundle), variant)
    with Grounder.load(demo_bundle) as grounder:
        assert (grounder.target.backend, grounder.target.device) == ("tensorrt", "Pretended GPU (SM 87)")
        assert set(grounder.target.variants.values()) == {variant}
        with grounder.open(path) as video:
            together = video.ground_many(texts)
            alone = [[video.ground(text) for text in texts] for _ in range(2)]
            assert isinstance(video.features.at(np.arange(2), Limits())[0], DeviceArray)
    for results in (together, *alone):
        for ours, theirs in zip(results, expected, strict=True):
            assert (ours.answer, ours.found, ours.span) == (theirs.answer, theirs.found, theirs.span)
            if theirs.boxes is not None:
                np.testing.assert_allclose(ours.boxes.boxes, theirs.boxes.boxes, atol=1e-2)
    assert machine.cuda.calls["cudaGraphLaunch"] > 0  # the queries asked last took steps that were captured before
    assert not machine.cuda.allocations and not machine.cuda.streams  # closing the Grounder freed everything


def test_only_small_things_cross_the_bus(demo_bundle, clip, tmp_path, monkeypatch):
    path, texts = clip
    machine = FakeMachine(monkeypatch, tmp_path / "cache", family="tensorrt", eager=())
    machine.build(Bundle.load(demo_bundle), "standard")
    with Grounder.load(demo_bundle) as grounder, grounder.open(path) as video:
        assert machine.cuda.copied["cudaMemcpyDeviceToHost"] < 20_000  # the last token's logits of each chunk
        result = video.ground(texts[0])
        answered = machine.cuda.copied["cudaMemcpyDeviceToHost"]
        assert result.found and answered < 100_000 < video.features.nbytes


def test_golden_cases_replay_on_the_device(demo_bundle, tmp_path, monkeypatch):
    machine = FakeMachine(monkeypatch, tmp_path / "cache", family="tensorrt_rtx", eager=())
    for variant in ("standard", "primitive"):
        machine.build(Bundle.load(demo_bundle), variant)
    lines = []
    replayed = verify_bundle(demo_bundle, backend="tensorrt-rtx", report=lines.append)
    assert set(replayed) == {"standard", "primitive"} and all(b.passed for found in replayed.values() for b in found)


def test_an_engine_with_a_small_cache_sees_smaller_frames(demo_bundle, clip, tmp_path, monkeypatch):
    path, texts = clip
    machine = FakeMachine(monkeypatch, tmp_path / "cache", family="tensorrt", eager=())
    machine.build(Bundle.load(demo_bundle), "standard", capacity=384)
    with Grounder.load(demo_bundle) as grounder, grounder.open(path) as video:
        results = video.ground_many(texts)
    assert "cache_capacity" in results[0].coarse.limited_by and results[0].coarse.tokens < 192
    assert all(result.answer for result in results)


class Lent:
    """A frame of another library in the device's memory; its buffer is used again for the next frame."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream)


def decoded(path):
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield float(frame.time), to_rgb(frame)


def test_frames_on_the_device_stay_there(demo_bundle, clip, tmp_path, monkeypatch):
    path, texts = clip
    machine = FakeMachine(monkeypatch, tmp_path / "cache", family="tensorrt", eager=())
    machine.build(Bundle.load(demo_bundle), "standard")
    with Grounder.load(demo_bundle) as grounder:
        expected = grounder.ground(decoded(path), texts[0])
        device, buffers = grounder.sessions["vision_encoder"].device, []

        def lent():
            for time, picture in decoded(path):
                if not buffers:
                    buffers.append(device.empty(picture.shape, np.uint8))
                buffers[0].write(picture)  # as a hardware decoder does
                yield time, Lent(buffers[0])

        before = machine.cuda.copied["cudaMemcpyDeviceToHost"]
        result = grounder.ground(lent(), texts[0])
        assert machine.cuda.copied["cudaMemcpyDeviceToHost"] - before < 100_000
    assert (result.answer, result.span) == (expected.answer, expected.span)
    np.testing.assert_array_equal(result.boxes.boxes, expected.boxes.boxes)


def test_frames_on_a_gpu_need_a_chain_there(demo_bundle):
    class OnGpu:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **options):
            raise AssertionError

    with Grounder.load(demo_bundle, backend="onnxruntime", threads=1) as grounder:
        with raises("video.wrong_device", "frame 0"):
            grounder.ground([(0.0, OnGpu())], "the dog")


def test_fewer_frames_than_an_engine_takes_are_filled_up_and_masked(demo_bundle, clip, tmp_path, monkeypatch):
    path, texts = clip
    bundle = Bundle.load(demo_bundle)
    with Grounder.load(demo_bundle, backend="onnxruntime", variant="standard", threads=1) as grounder:
        expected = grounder.ground(path, texts[0])
    machine = FakeMachine(monkeypatch, tmp_path / "cache", family="tensorrt", eager=())
    machine.build(bundle, "standard")
    buckets = [{**CHAIN_PROFILES["spatial_decoder"][0], "F": (64, 64, 64)}]
    machine.build_graph(bundle, bundle.graph("spatial_decoder", "standard"), buckets, capacity=1024)
    for entry in read_engines(bundle, bundle.graph("spatial_decoder", "standard")):
        if entry.profiles["profile 0"]["F"][0] == 1:
            shutil.rmtree(entry.folder)
    with Grounder.load(demo_bundle) as grounder:
        result = grounder.ground(path, texts[0])
    assert len(result.tube) < 64 and result.span == expected.span
    np.testing.assert_allclose(result.boxes.boxes, expected.boxes.boxes, atol=1e-2)


@pytest.mark.parametrize("schedule", ["late", "work hurries"])
def test_many_threads_share_one_chain(demo_bundle, clip, tmp_path, monkeypatch, schedule):
    path, texts = clip
    machine = FakeMachine(monkeypatch, tmp_path / "cache", family="tensorrt", eager=SCHEDULES[schedule])
    machine.build(Bundle.load(demo_bundle), "primitive")
    with Grounder.load(demo_bundle) as grounder, grounder.open(path) as video:
        alone = [video.ground(text) for text in texts]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(video.ground, texts * 3))
    for ours, theirs in zip(together, alone * 3, strict=True):
        assert (ours.answer, ours.span) == (theirs.answer, theirs.span)
        if theirs.boxes is not None:
            np.testing.assert_allclose(ours.boxes.boxes, theirs.boxes.boxes, atol=1e-2)
