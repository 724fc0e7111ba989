"""Media are found, and opened as the model takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from bridge_stg.evaluation.datasets.registry import read_dataset
from bridge_stg.evaluation.media import MediaFolder, clip_frames, folder_frames, video_input
from bridge_stg.evaluation.run.evaluate import Model, identity_of, run_task
from bridge_stg.evaluation.samples import Dataset, Sample, span_truth
from tests.errors import raises
from tests.evaluation import official
from tests.fakes.chain import fake_grounder
from tests.fakes.clips import two_streams


def test_media_are_found_by_path_name_or_stem(tmp_path: Path) -> None:
    for name in ("a/one.mp4", "b/two.webm", "b/two.json", "three.mp4"):
        official.empty(tmp_path / name, 0, 0)
    folder = MediaFolder(tmp_path)
    assert folder.find("a/one.mp4") == folder.find("one.mp4") == folder.find("one.mkv") == tmp_path / "a/one.mp4"
    assert folder.find("two.mp4") == tmp_path / "b/two.webm"
    assert folder.find("four.mp4", "three.mp4") == tmp_path / "three.mp4"
    assert folder.find("four.mp4") is None and folder.at("one.mp4") is None


def test_a_part_of_a_video(tmp_path: Path) -> None:
    official.video(tmp_path / "v.mp4", 4, 10)
    frames = list(clip_frames(tmp_path / "v.mp4", 1.5, 3.0))
    np.testing.assert_allclose([time for time, _ in frames], np.arange(15) / 10, atol=1e-6)
    left = official.box_at(1.5)[0]
    red = frames[0][1][30, :, 0].astype(int) > 130
    assert abs(int(red.argmax()) - left) <= 2  # the first frame shown is that of 1.5 s
    with raises("video.too_short", "9.00", "10.00"):
        list(clip_frames(tmp_path / "v.mp4", 9, 10))


def test_another_video_stream_of_all_samples(tmp_path: Path) -> None:
    path = two_streams(tmp_path / "v.mkv", default=0)
    whole = Sample("1", "span", path, "v.mkv", "the car", lambda: span_truth((0, 0.3)))
    part = replace(whole, id="2", clip=(0.1, 0.4))
    for stream, width in ((None, 64), (1, 96)):
        dataset = Dataset("d", "", (whole, part), "").with_stream(stream)
        with fake_grounder() as grounder:
            sizes = [run_task(grounder, one, one.read_truth(), allow_none=True).size for one in dataset.samples]
        assert [size[0] for size in sizes] == [width, width]
        assert identity_of(dataset, Model("m", {}, fake_grounder))["stream"] == stream


def test_a_segment_of_vidstg_is_what_the_model_sees(tmp_path: Path) -> None:
    files = official.vidstg(tmp_path, official.video)
    whole, *_, cut = read_dataset("vidstg", files.annotations, files.media).samples
    assert video_input(whole) == str(tmp_path / "video/0021/3557382625.mp4")
    times = [time for time, _ in video_input(cut)]
    np.testing.assert_allclose(times, cut.read_truth().times, atol=1e-6)


def test_a_folder_of_frames(tmp_path: Path) -> None:
    for name in ("10.jpg", "2.jpg", "1.jpg"):
        Image.new("RGB", (8, 6), (int(name[:-4]) * 10, 0, 0)).save(tmp_path / name, quality=100, subsampling=0)
    (tmp_path / "groundtruth.txt").touch()
    frames = list(folder_frames(tmp_path, 10))
    assert [time for time, _ in frames] == [0, 0.1, 0.2]
    assert [round(frame[0, 0, 0] / 10) for _, frame in frames] == [1, 2, 10]
    (tmp_path / "3.jpg").write_bytes(b"no picture")
    with raises("video.unreadable", "3.jpg"):
        list(folder_frames(tmp_path, 10))
