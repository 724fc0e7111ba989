"""Which backend "auto" takes on a machine with a GPU, and what it says of the others."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from bridge_stg.runtime.backends import registry as backends
from bridge_stg.runtime.backends.choose import choose, open_sessions
from bridge_stg.runtime.backends.registry import BACKENDS, usual_sizes
from bridge_stg.runtime.backends.tensorrt import engine_cache
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.device.cuda import Cuda, DeviceFacts
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host import packages as runtime_packages
from tests.errors import raises
from tests.fakes.cuda import FakeCuda
from tests.fakes.streams import cudaError_t

ALL = {
    "tensorrt": "10.15.1", "tensorrt-rtx-cu13-bindings": "1.7.1", "onnxruntime-gpu": "1.32.0", "onnxruntime": "1.32.0",
}  # fmt: skip
ORIN = DeviceFacts("Orin", 87, True)


@pytest.fixture
def machine(monkeypatch):
    """Pretend packages, a GPU (or why there is none), and which families have engines."""

    def pretend(packages, *, gpu=ORIN, engines=()) -> None:
        def facts() -> DeviceFacts:
            if isinstance(gpu, str):
                raise EngineError("engine.no_device", gpu)
            return gpu

        def find(bundle, graph, device):
            assert (device.sm, device.version) == (87, packages.get(device.family, "1.7.1"))
            if (device.family, graph.variant) not in engines:
                raise EngineError("engine.not_built", f"no engine of {graph} has been built for {device.family}")
            return SimpleNamespace()

        monkeypatch.setattr(runtime_packages, "installed_version", packages.get)
        monkeypatch.setattr(backends, "gpu", facts)
        monkeypatch.setattr(engine_cache, "find_engine", find)

    return pretend


@pytest.mark.parametrize(
    ("engines", "backend", "variant", "passed_over"),
    [
        ([("tensorrt", "standard"), ("tensorrt_rtx", "standard")], "tensorrt", "standard", []),
        ([("tensorrt", "primitive")], "tensorrt", "primitive", []),
        ([("tensorrt_rtx", "standard")], "tensorrt-rtx", "standard", ["no engine of language_model (standard)"]),
        ([], "onnxruntime-cuda", "primitive", ["built for tensorrt;", "built for tensorrt_rtx"]),
    ],
)
def test_auto_takes_the_first_that_is_ready(*, bundle_path, machine, engines, backend, variant, passed_over):
    machine(ALL, engines=engines)
    target = choose(Bundle.load(bundle_path))
    assert (target.backend, target.variants) == (backend, {"language_model": variant})
    assert target.device == "Orin (SM 87)"
    assert all(text in target.reason for text in passed_over)
    assert target.to_json()["reason"] == target.reason and backend in str(target)


@pytest.mark.parametrize(("version", "told"), [("1.31.1", True), ("1.32.0", False)])
def test_the_newest_onnxruntime_for_gpus_takes_primitive_and_says_so(bundle_path, machine, version, told):
    machine({"onnxruntime-gpu": version})
    target = choose(Bundle.load(bundle_path))
    assert (target.backend, target.variants) == ("onnxruntime-cuda", {"language_model": "primitive"})
    assert ("does not run the variant standard, so primitive is taken" in str(target)) == told


def test_without_a_gpu_it_is_the_cpu_and_the_reason_says_so(bundle_path, machine):
    machine(ALL, gpu="the NVIDIA driver is missing")
    target = choose(Bundle.load(bundle_path))
    assert (target.backend, target.device) == ("onnxruntime", "CPU")
    assert target.reason.count("has no GPU: the NVIDIA driver is missing") == 3
    with raises("engine.no_device", "'tensorrt' has no GPU: the NVIDIA driver is missing"):
        choose(Bundle.load(bundle_path), backend="tensorrt")
    machine({"onnxruntime": "1.32.0"}, gpu="nobody asks")
    assert "nobody asks" not in choose(Bundle.load(bundle_path)).reason


def test_what_compiles_for_minutes_is_taken_only_when_asked_for(bundle_path, machine):
    machine(ALL, engines=[])
    asked = choose(Bundle.load(bundle_path), backend="onnxruntime-tensorrt")
    assert (asked.backend, asked.reason) == ("onnxruntime-tensorrt", "requested")
    assert [b.name for b in BACKENDS if not b.automatic] == ["onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"]


def test_versions_of_tensorrt_that_cannot_update_a_cache_in_place(bundle_path, machine):
    machine(ALL | {"tensorrt": "10.3.0"}, engines=[("tensorrt", "standard"), ("tensorrt", "primitive")])
    assert choose(Bundle.load(bundle_path)).variants == {"language_model": "primitive"}
    with raises("engine.no_variant", "'standard'", "tensorrt 10.3.0", "primitive"):
        choose(Bundle.load(bundle_path), backend="tensorrt", variant="standard")


def test_sessions_know_their_target(bundle_path):
    sessions = open_sessions(Bundle.load(bundle_path), backend="onnxruntime", threads=1)
    assert sessions.target.backend == "onnxruntime" and sessions.target.reason.startswith("requested")
    for session in sessions.values():
        session.close()


def test_cuda_without_a_driver_or_a_device_is_told():
    class NoDriver(FakeCuda):
        def cudaGetDeviceCount(self):
            return cudaError_t.cudaErrorInsufficientDriver, None

    class NoDevice(FakeCuda):
        def cudaGetDeviceCount(self):
            return cudaError_t.cudaSuccess, 0

    with raises("engine.no_device", "CUDA 13.4", "cuda-python<13"):
        Cuda(NoDriver())
    with raises("engine.no_device", "CUDA finds no device"):
        Cuda(NoDevice())
    assert Cuda(FakeCuda()).facts() == DeviceFacts("Pretended GPU", 87, True)


def test_sizes_of_a_chain_are_in_order_and_whole_patches(model_spec):
    sizes = usual_sizes(model_spec)
    assert all(0 < least <= usual <= most for least, usual, most in sizes.values())
    side = model_spec.vision.patch_size * model_spec.vision.merge_size
    assert all(size % side == 0 for size in sizes["height"])
    huge = dataclasses.replace(model_spec.frames, coarse_max_pixels=10**6, fine_max_pixels=2 * 10**6)
    assert usual_sizes(dataclasses.replace(model_spec, frames=huge))["N"][2] == 2 * 10**6 // 16**2
