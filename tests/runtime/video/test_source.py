"""The sampling grid, streams of frames, images, and the kinds of video that `open_source` takes."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from bridge_stg.runtime.errors import Interrupted
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.packages import install_command, load_package
from bridge_stg.runtime.video.frame import resize
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.video.sampling import GridSampler
from tests.errors import raises
from tests.fakes.clips import SPEC, gif_with_a_huge_frame

ROOT = Path(__file__).resolve().parents[3]


def picture(value: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value % 256, np.uint8)


def counted(count: int, rate: float = 10, start: float = 0) -> Iterator[tuple[float, np.ndarray]]:
    """Frame k is grey of value k; all are drawn into one buffer, as capture libraries do."""
    buffer = picture(0)
    for index in range(count):
        buffer[:] = index % 256
        yield start + index / rate, buffer


def test_the_grid_is_thinned_evenly_for_any_length() -> None:
    for length in (0.1, 3, 4, 4.1, 31.9, 32, 32.1, 1e6):
        sampler: GridSampler[float] = GridSampler(2.0, capacity=8)
        for until in np.linspace(0, length, 50)[1:]:
            sampler.fill(until, lambda time=until: time)
        stride = 1
        while np.ceil(length * 2 / stride) > 8:
            stride *= 2
        assert sampler.stride == stride
        np.testing.assert_array_equal(sampler.times, np.arange(np.ceil(length * 2 / stride)) * stride / 2)
        assert (np.array(sampler.items) > sampler.times).all()


def test_a_stream_is_sampled_like_a_video() -> None:
    reports: list[tuple[float, float | None]] = []
    frames = counted(24, start=7)
    limits = Limits(progress=lambda _, done, total: reports.append((done, total)))
    with open_source(frames, SPEC) as source:
        assert (source.width, source.height, source.is_image) == (64, 48, False)
        coarse = source.coarse(limits)
        assert source.duration_s == pytest.approx(2.4)
        np.testing.assert_allclose(source.frame_times, np.arange(24) / 10)
        np.testing.assert_array_equal(coarse.times, [[0, 0.5], [1, 1.5], [2, 2]])
        np.testing.assert_array_equal(coarse.frames[:, :, 0, 0, 0], [[0, 5], [10, 15], [20, 20]])
        assert coarse.frames.shape == (3, 2, 16, 32, 3)
        fine = source.fine(source.fine_grid())
        np.testing.assert_array_equal(fine.frames[:, 0, 0, 0], np.arange(12) * 2)
        np.testing.assert_allclose(fine.times, np.arange(12) / 5)
        assert fine.frames.shape == (12, 48, 64, 3)
        np.testing.assert_array_equal(source.fine([2.2, 0, 99, -1]).frames[:, 0, 0, 0], [22, 0, 22, 0])
    assert reports[-1] == (pytest.approx(2.3), None)
    assert source.coarse() is coarse
    with raises("video.closed"):
        source.fine([0])


def test_a_long_stream_is_thinned_in_constant_memory() -> None:
    def frames(count: int) -> Iterator[tuple[float, np.ndarray]]:
        for index in range(count):
            yield index / 10, picture(index * 256 // count, 240, 320)

    peaks = []
    for count in (200, 2000):
        tracemalloc.start()
        with open_source(frames(count), SPEC, buffer_frames=16) as source:
            coarse = source.coarse()
            fine = source.fine(source.fine_grid())
        peaks.append(tracemalloc.get_traced_memory()[1] - fine.frames.nbytes)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300_000  # the frames themselves would be 460 MB
    assert coarse.interval_s == 16 and coarse.times.size == 14
    values, counts = np.unique(fine.times, return_counts=True)
    np.testing.assert_allclose(values, np.arange(16) * 12.8)
    assert set(counts[:-1]) == {64}
    np.testing.assert_array_equal(np.unique(fine.frames[:, 0, 0, 0]), values * 10 * 256 // 2000)


def test_a_stream_of_one_frame() -> None:
    with open_source([(3.0, picture(9))], SPEC) as source:
        assert source.coarse().frames.shape[:2] == (1, 2)
        assert source.duration_s == 0.5
        assert (source.fine([0.4]).frames == 9).all()


def test_a_stream_is_read_once() -> None:
    with open_source(counted(5), SPEC) as source:
        with pytest.raises(Interrupted):
            source.coarse(Limits(cancel=lambda: True))
        with raises("video.closed"):
            source.coarse()


STREAMS = {
    "no frames": ([], "video.no_frames", []),
    "no pair": ([picture(0)], "video.bad_frame", ["frame 0", "ndarray"]),
    "same time": ([(0, picture(0)), (0, picture(0))], "video.bad_time", ["frame 1", "0.0 s after 0.0 s"]),
    "falling time": ([(1.5, picture(0)), (1, picture(0))], "video.bad_time", ["1.0 s after 1.5 s"]),
    "negative time": ([(-0.5, picture(0))], "video.bad_time", ["-0.5"]),
    "NaN time": ([(0, picture(0)), (float("nan"), picture(0))], "video.bad_time", ["frame 1", "nan"]),
    "infinite time": ([(float("inf"), picture(0))], "video.bad_time", ["inf"]),
    "no number": ([("0", picture(0))], "video.bad_time", ["str"]),
    "float frames": ([(0, picture(0) / 255)], "video.bad_frame", ["float64", "uint8"]),
    "no array": ([(0, "a.png")], "video.bad_frame", ["str"]),
    "grey": ([(0, picture(0)[..., 0])], "video.bad_frame", ["[48, 64]"]),
    "alpha": ([(0, np.zeros((8, 8, 4), np.uint8))], "video.bad_frame", ["[8, 8, 4]"]),
    "channels first": ([(0, np.zeros((3, 8, 8), np.uint8))], "video.bad_frame", ["[3, 8, 8]"]),
    "no pixels": ([(0, np.zeros((0, 8, 3), np.uint8))], "video.bad_frame", ["[0, 8, 3]"]),
    "changing size": ([(0, picture(0)), (1, picture(0, 48, 32))], "video.size_changed", ["32 × 48", "64 × 48"]),
    "narrow": ([(0, picture(0, 1, 300))], "video.bad_shape", ["300 × 1"]),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_bad_streams(kind: str) -> None:
    frames, code, values = STREAMS[kind]
    with raises(code, *values), open_source(iter(frames), SPEC) as source:
        source.coarse()


def test_times_in_another_unit() -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    stream = iter([(0.0, picture), (3e9, picture)])  # nanoseconds
    with open_source(stream, SPEC) as source, raises("video.too_long", "6e+09 s"):
        source.fine_grid()


@pytest.mark.parametrize("value", [7, None, b"a.mp4", {"a": 1}])
def test_values_that_are_not_videos(value: object) -> None:
    with raises("video.bad_type", type(value).__name__):
        open_source(value, SPEC)  # type: ignore[arg-type]


def test_bad_arrays_and_buffers() -> None:
    with raises("video.bad_frame", "[4, 8, 8, 3]", "iterator of"):
        open_source(np.zeros((4, 8, 8, 3), np.uint8), SPEC)
    with raises("video.bad_frame", "float32"):
        open_source(np.zeros((8, 8, 3), np.float32), SPEC)
    for size in (0, -1, 2.5, True):
        with raises("video.bad_option", f"buffer_frames={size}"):
            open_source(counted(3), SPEC, buffer_frames=size)  # type: ignore[arg-type]


def expect_image(video: object, expected: np.ndarray, tolerance: int = 0) -> None:
    with open_source(video, SPEC) as source:  # type: ignore[arg-type]
        assert source.is_image
        assert (source.height, source.width) == expected.shape[:2]
        coarse = source.coarse()
        assert coarse.frames.shape[:2] == (1, 2) and not coarse.times.any()
        assert (coarse.interval_s, coarse.duration_s, source.duration_s) == (0.5, 0.5, 0.5)
        np.testing.assert_array_equal(source.frame_times, [0])
        np.testing.assert_array_equal(source.fine_grid(), [0])
        fine = source.fine([0, 0.3])
        np.testing.assert_array_equal(fine.times, [0, 0])
        wanted = resize(expected, fine.frames.shape[1:3])
        for frame in fine.frames:
            assert np.abs(frame.astype(int) - wanted).max() <= tolerance
        for frame in coarse.frames[0]:
            assert np.abs(frame.astype(int) - resize(expected, frame.shape[:2])).max() <= tolerance


def drawing(height: int = 40, width: int = 50) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 5, columns * 4, 200 - rows - columns], axis=-1).astype(np.uint8)


def test_arrays_are_images() -> None:
    expect_image(drawing(), drawing())


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.jpg", 12), ("a.png", 0), ("a.webp", 30), ("a.bmp", 0), ("a.tiff", 0), ("a.ppm", 0)]
)
def test_image_files(name: str, tolerance: int, tmp_path: Path) -> None:
    Image.fromarray(drawing()).save(tmp_path / name, quality=98)
    (tmp_path / name).rename(tmp_path / "called.mp4")  # the content counts, not the name
    expect_image(tmp_path / "called.mp4", drawing(), tolerance)
    expect_image(str(tmp_path / "called.mp4"), drawing(), tolerance)


def test_image_modes(tmp_path: Path) -> None:
    rgb = Image.fromarray(drawing())
    grey = np.asarray(rgb.convert("L"))
    grey_rgb = np.repeat(grey[..., None], 3, axis=-1)
    alpha = np.zeros(grey.shape, np.uint8)
    alpha[:, 20:] = 255
    over_white = np.where(alpha[..., None] == 255, drawing(), 255).astype(np.uint8)
    clear = rgb.copy()
    clear.putalpha(Image.fromarray(alpha))
    palette = rgb.quantize(16)
    hole = palette.getpixel((5, 5))
    holed = np.asarray(palette.convert("RGB")).copy()
    holed[np.asarray(palette) == hole] = 255
    grey_alpha = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    bits = Image.fromarray(grey).convert("1")
    cases: dict[str, tuple[Image.Image, np.ndarray, dict]] = {
        "rgba.png": (clear, over_white, {}),
        "la.png": (grey_alpha, np.where(alpha[..., None] == 255, grey_rgb, 255).astype(np.uint8), {}),
        "l.png": (Image.fromarray(grey), grey_rgb, {}),
        "p.png": (palette, np.asarray(palette.convert("RGB")), {}),
        "holed.png": (palette, holed, {"transparency": hole}),
        "bits.png": (bits, np.asarray(bits.convert("RGB")), {}),
        "16bit.png": (Image.fromarray(grey.astype(np.uint16) * 257), grey_rgb, {}),
        "32bit.tiff": (Image.fromarray(grey.astype(np.int32) * 257), grey_rgb, {}),
        "float.tiff": (Image.fromarray(grey.astype(np.float32) / 255), grey_rgb, {}),
        "cmyk.tiff": (rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB")), {}),
        "still.gif": (palette, np.asarray(palette.convert("RGB")), {}),
        "pages.tiff": (rgb, drawing(), {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
    }
    for name, (image, expected, options) in cases.items():
        image.save(tmp_path / name, **options)
        expect_image(tmp_path / name, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(drawing())
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as read:
        expected = np.asarray(ImageOps.exif_transpose(read))
    assert (expected.shape[:2] == (50, 40)) == (orientation > 4)
    expect_image(tmp_path / "a.png", expected)


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_huge_frame_of_an_animation_is_an_error(number: int, tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(gif_with_a_huge_frame(number))
    with raises("video.unreadable", "a.gif"), open_source(path, SPEC) as source:
        source.coarse()
    with raises("video.unreadable", "a.gif"), play(path) as playback:
        list(playback.frames)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_animations_are_videos(name: str, tmp_path: Path) -> None:
    images = [Image.fromarray(picture(20 * k)) for k in range(6)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=300, lossless=True)
    with open_source(tmp_path / name, SPEC) as source:
        assert not source.is_image
        np.testing.assert_allclose(source.frame_times, np.arange(6) * 0.3)
        assert source.duration_s == pytest.approx(1.8)
        np.testing.assert_array_equal(source.fine([0, 0.7, 1.6]).frames[:, 0, 0, 0], [0, 40, 100])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_truncated_images(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with raises("video.unreadable", name):
        open_source(path, SPEC)


def test_images_that_this_pillow_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    with raises("video.unsupported_codec", "a.heic"):
        open_source(path, SPEC)


def test_huge_and_narrow_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture(0, 2, 402)).save(tmp_path / "narrow.png")
    with raises("video.bad_shape", "narrow.png", "402 × 2"):
        open_source(tmp_path / "narrow.png", SPEC)
    Image.fromarray(picture(0)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with raises("video.unreadable", "bomb.png"):
        open_source(tmp_path / "bomb.png", SPEC)


def test_packages_are_imported_when_needed() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import bridge_stg.runtime.video.source, bridge_stg.runtime.video.file, bridge_stg.runtime.video.image; "
        "import bridge_stg.runtime.video.open; print(sorted({'av', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "package"), [("av", "av"), ("PIL.Image", "pillow")])
def test_a_missing_package_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with raises("host.missing_package", repr(package), install_command("cpu")):
        load_package(module, package)


def test_times_far_in_the_future_take_no_time_to_count() -> None:
    for last_s in (1e9, 2.0**70, 1e300):
        with open_source([(0.0, picture(0)), (last_s, picture(1))], SPEC) as source:
            assert source.coarse().times.shape[1] == 2
            with raises("video.too_long"):
                source.fine_grid()
