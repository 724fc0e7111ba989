"""Arrays on the device against numpy: views, copies, joining, lending and resizing, on a pretended device."""

from __future__ import annotations

import gc
import sys

import numpy as np
import onnxruntime
import pytest

from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device import dlpack
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import Cuda
from bridge_stg.runtime.device.kernel import compile_kernel
from bridge_stg.runtime.device.memory import size_class
from bridge_stg.runtime.device.resize import DeviceResizer
from bridge_stg.runtime.video.frame import resize
from tests.errors import raises
from tests.fakes.cuda import FakeCuda
from tests.fakes.kernels import FakeDriver, FakeNvrtc, fill
from tests.fakes.streams import OK


@pytest.fixture(params=[(), (0,), (1,)])
def cuda(request) -> FakeCuda:
    return FakeCuda(eager=request.param)


@pytest.fixture
def context(cuda):
    opened = DeviceContext(Cuda(cuda)).open()
    yield opened
    opened.close()
    assert not cuda.allocations and not cuda.pinned and not cuda.streams and not cuda.events


@pytest.fixture
def random():
    return np.random.default_rng(0)


INDICES = [
    np.s_[1], np.s_[-1], np.s_[1:3], np.s_[:, 1],
    np.s_[:, 1:], np.s_[:, :, 0], np.s_[2:1], np.s_[:, :, 1:2], np.s_[0, 1:3, 2],
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_views_are_those_of_numpy(context, random, index):
    whole = random.normal(size=(4, 3, 5)).astype(np.float32)
    array = context.upload(whole)
    assert array[index].shape == whole[index].shape and array[index].strides == whole[index].strides
    np.testing.assert_array_equal(array[index].numpy(), whole[index])
    new = random.normal(size=whole[index].shape).astype(np.float32)
    for value in (new, context.upload(new)):
        array[index] = value
        expected = whole.copy()
        expected[index] = new
        np.testing.assert_array_equal(array.numpy(), expected)


def test_views_of_views_are_copied_in_few_pieces(context, cuda, random):
    whole = random.normal(size=(2, 6, 4, 3)).astype(np.float16)
    array = context.upload(whole)
    part = array[:, 1:5][:, :, 1:3]
    assert not part.contiguous and array[1].contiguous and array[:, 2:2].contiguous
    np.testing.assert_array_equal(np.asarray(part), whole[:, 1:5][:, :, 1:3])
    assert len(list(array)) == 2 and array.reshape(12, 12).shape == (12, 12)
    with pytest.raises(IndexError, match="step 1, not 2"):
        array[::2]
    with pytest.raises(IndexError, match="out of bounds for axis 1 of size 6"):
        array[0, 6]
    with raises("engine.bad_input", "float16 [1]", "float16 [2, 6, 4, 3]"):
        array.write(np.zeros(1, np.float16))


def test_joining_and_stacking_equal_numpy(context, random):
    parts = [random.normal(size=(3, n, 4)).astype(np.float32) for n in (2, 1, 5)]
    on_device = [context.upload(part) for part in parts]
    for zeros in (0, 1):
        np.testing.assert_array_equal(
            arrays.join(on_device, axis=1, zeros_before=zeros).numpy(), arrays.join(parts, axis=1, zeros_before=zeros)
        )
    same, device_same = [parts[0], parts[0] + 1], [on_device[0], context.upload(parts[0] + 1)]
    for axis in (0, 1, 2):
        np.testing.assert_array_equal(arrays.stack(device_same, axis=axis).numpy(), np.stack(same, axis=axis))
    repeated = arrays.repeat_new_axis(on_device[0], 2)
    np.testing.assert_array_equal(repeated.numpy(), arrays.repeat_new_axis(parts[0], 2))


def test_memory_is_used_again_and_no_value_is_lost(context, cuda, random):
    values = [random.normal(size=(50, 50)).astype(np.float32) for _ in range(30)]
    kept = []
    for i, value in enumerate(values):
        array = context.upload(value).copy()
        if i % 3 == 0:
            kept.append((array, value))
    assert cuda.calls["cudaMalloc"] < 20
    for array, value in kept:
        np.testing.assert_array_equal(array.numpy(), value)


def test_a_full_device_frees_unused_blocks():
    cuda = FakeCuda(memory=2**20)
    context = DeviceContext(Cuda(cuda)).open()
    for size in (2**18, 2**19, 3 * 2**18, 2**19 + 2**18):
        context.empty([size], np.uint8)
    held = context.empty([2**19], np.uint8)
    with raises("engine.out_of_memory", "1 MiB", "0 MiB are free"):
        context.empty([2**20], np.uint8)
    assert held.nbytes == 2**19
    assert size_class(5000) == 8192 and size_class(2**20 + 1) <= 2**20 * 9 / 8
    context.close()


def test_exported_memory_is_not_reused_before_the_other_library_releases_it(context, cuda):
    array = context.zeros((2, 3), np.int64)
    imported = dlpack.import_array(array, stream=context.uploads)
    assert (imported.address, imported.shape, imported.strides, imported.dtype) == (
        array.address,
        (2, 3),
        (24, 8),
        np.dtype("int64"),
    )
    assert array.__dlpack_device__() == (dlpack.CUDA, 0)
    address = array.address
    del array
    gc.collect()
    others = [context.empty((2, 3), np.int64) for _ in range(4)]
    assert address not in {other.address for other in others}
    del imported
    gc.collect()
    assert context.empty((2, 3), np.int64).address == address
    unread = context.zeros((4,), bool).__dlpack__(stream=-1)
    del unread  # a capsule that was never imported


@pytest.mark.skipif(not hasattr(onnxruntime.OrtValue, "__dlpack__"), reason="this onnxruntime exports no DLPack")
def test_arrays_of_other_libraries(context):
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))  # on the CPU
    np.testing.assert_array_equal(arrays.accept(value, context), value.numpy())
    other = DeviceContext(Cuda(FakeCuda())).open()
    array = other.upload(np.arange(3))
    assert isinstance(arrays.accept(array, context), np.ndarray)  # an array of another chain is copied through the host
    assert arrays.accept("text", context) == "text"

    class Elsewhere:
        def __dlpack_device__(self):
            return (dlpack.CUDA, 3)

        def __dlpack__(self, **options):
            raise AssertionError

    with raises("engine.bad_input", "Elsewhere", "(2, 3)", "CUDA device 0"):
        arrays.accept(Elsewhere(), context)
    other.close()


@pytest.mark.parametrize(
    ("size", "target"),
    [((48, 64), (32, 32)), ((37, 53), (64, 96)), ((96, 160), (32, 64)), ((32, 64), (32, 96)), ((50, 64), (32, 64))],
)
def test_pictures_are_resized_to_the_bytes_of_pillow(context, cuda, random, size, target):
    driver = FakeDriver(cuda)
    resizer = DeviceResizer(context, (FakeNvrtc(), driver))
    picture = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = resizer.resize(context.upload(picture), target, resize)
    assert isinstance(ours, DeviceArray) and driver.launches == sum(a != b for a, b in zip(size, target, strict=True))
    np.testing.assert_array_equal(ours.numpy(), resize(picture, target))
    same = resizer.resize(ours, target, resize)
    assert same.address != ours.address


def test_without_the_compiler_pictures_are_resized_on_the_host(context, cuda, random, caplog, monkeypatch):
    resizer = DeviceResizer(context, (FakeNvrtc(knows=(80, 90)), FakeDriver(cuda)))
    assert "frames on the GPU are resized on the host: nvrtcCompileProgram failed" in caplog.text
    picture = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    ours = resizer.resize(context.upload(picture), (32, 32), resize)
    np.testing.assert_array_equal(ours.numpy(), resize(picture, (32, 32)))

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # an import of it fails
    assert isinstance(resize(context.upload(picture), (32, 32)), DeviceArray)  # as the sources of frames call it


@pytest.mark.parametrize("sm", [75, 87, 90, 110, 120])
def test_the_real_compiler_makes_machine_code(sm):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason='no cuda-python here: pip install -e ".[rtx]"')
    assert compile_kernel(sm, nvrtc).startswith(b"\x7fELF")
    with raises("engine.device_failed", "SM 10"):
        compile_kernel(10, nvrtc)


def test_the_driver_takes_no_code_of_another_kind(context, cuda, caplog):
    class PtxCompiler(FakeNvrtc):
        def nvrtcGetCUBIN(self, program, code):
            fill(code, b"." * len(code))
            return (OK,)

    assert not DeviceResizer(context, (PtxCompiler(), FakeDriver(cuda))).compiled
    assert "UnsupportedPtxVersion" in caplog.text


def test_use_after_the_chain_was_closed(cuda):
    context = DeviceContext(Cuda(cuda)).open()
    array = context.zeros((3,), np.float32)
    context.close()
    with raises("engine.closed", "device array"):
        array.numpy()
    with raises("engine.closed", "device context"):
        context.zeros((3,), np.float32)
    del array  # returns to a closed pool
