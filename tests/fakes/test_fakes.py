"""The fakes of CUDA and TensorRT have the names of the real packages."""

from __future__ import annotations

import inspect

import pytest

from tests.fakes import cuda as fake_cuda
from tests.fakes import kernels as fake_kernels
from tests.fakes import tensorrt as fake_tensorrt


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


def test_cuda_python_has_what_is_called():
    api = pytest.importorskip("cuda.bindings.runtime", reason='no cuda-python here: pip install -e ".[rtx]"')
    driver = pytest.importorskip("cuda.bindings.driver")
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    called = {name for name in public(fake_cuda.FakeCuda) if name.startswith("cuda")}
    assert len(called) > 25 and not {name for name in called if not hasattr(api, name)}
    for kind in (fake_cuda.cudaError_t, fake_cuda.cudaMemcpyKind, fake_cuda.cudaStreamCaptureMode):
        real = getattr(api, kind.__name__)
        assert {member.name: member.value for member in kind}.items() <= {m.name: m.value for m in real}.items()
    for name in ("cudaStreamNonBlocking", "cudaEventDisableTiming", "cudaHostAllocDefault"):
        assert getattr(fake_cuda.FakeCuda, name) == getattr(api, name)
    assert all(hasattr(driver, name) for name in public(fake_kernels.FakeDriver))
    assert all(hasattr(nvrtc, name) for name in public(fake_kernels.FakeNvrtc))


def test_tensorrt_has_what_is_called():
    real = pytest.importorskip("tensorrt_rtx_bindings", reason='no TensorRT-RTX here: pip install -e ".[rtx]"')
    pairs = {
        "Runtime": fake_tensorrt.Runtime, "ICudaEngine": fake_tensorrt.Engine,
        "IExecutionContext": fake_tensorrt.Context, "IRuntimeConfig": fake_tensorrt.Config,
        "IRuntimeCache": fake_tensorrt.KernelCache,
    }  # fmt: skip
    for name, kind in pairs.items():
        assert not {method for method in public(kind) if not hasattr(getattr(real, name), method)}, name
    assert hasattr(real.ICudaEngine, "create_engine_inspector") and hasattr(real.LayerInformationFormat, "JSON")
    assert hasattr(real.EngineInspector, "get_engine_information")
    for name in ("num_io_tensors", "num_optimization_profiles"):
        assert hasattr(real.ICudaEngine, name)
    assert hasattr(real.IRuntimeConfig, "cuda_graph_strategy")
    for kind in (
        fake_tensorrt.TensorIOMode,
        fake_tensorrt.TensorLocation,
        fake_tensorrt.DataType,
        fake_tensorrt.ExecutionContextAllocationStrategy,
        fake_tensorrt.CudaGraphStrategy,
    ):
        assert all(hasattr(getattr(real, kind.__name__), member.name) for member in kind)
