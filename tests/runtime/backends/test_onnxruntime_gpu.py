"""onnxruntime's GPU providers: what they are asked for, and that a chain's buffers are used where they lie.

onnxruntime computes on the CPU here, in memory that the pretended device gives; binding, order and cache are real.
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.backends.onnxruntime_gpu import (
    CUDA,
    PLUGIN,
    TENSORRT,
    TENSORRT_RTX,
    OnnxRuntimeDeviceSession,
    load_cuda,
)
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import Cuda
from tests.errors import raises
from tests.fakes.cuda import FakeCuda

SIZES = {"B": (1, 1, 4), "L": (1, 8, 64), "S": (16, 32, 64)}


def feeds(ids: list[list[int]], positions: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids), "cache_position": np.array(positions)}


class Provider:
    """Stands in for a GPU provider: opens files on the CPU, and keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, left_out: bool = False) -> None:  # noqa: C901 - nested fakes share state
        self.cuda = FakeCuda(addressable=True)
        self.device = DeviceContext(Cuda(self.cuda))
        self.asked: list[Any] = []
        self.bound: list[tuple[str, str]] = []
        real, outer = onnxruntime.InferenceSession, self

        class Binding:
            def __init__(self, binding: Any) -> None:
                self.inner = binding

            def bind_input(self, name: str, device: str, number: int, *rest: Any) -> None:
                assert (device, number) == ("cuda", 0)
                self.inner.bind_input(name, "cpu", 0, *rest)

            def bind_output(self, name: str, device: str, number: int, *rest: Any) -> None:
                outer.bound.append((name, device))
                self.inner.bind_output(name, "cpu", 0, *rest)

            def get_outputs(self) -> list[Any]:
                found = self.inner.get_outputs()
                for value in found:  # memory of the provider's own is the device's too
                    outer.cuda.adopt(value.data_ptr(), value.tensor_size_in_bytes())
                return found

            def __getattr__(self, name: str) -> Any:
                return getattr(self.inner, name)

        class Session:
            def __init__(self, path: str, sess_options: Any, providers: Any = None, **rest: Any) -> None:
                outer.asked.append(providers)
                self.inner = real(path, sess_options=sess_options, providers=["CPUExecutionProvider"])
                self.providers = [] if left_out else [providers[0][0] if providers else TENSORRT_RTX]

            def get_providers(self) -> list[str]:
                return [*self.providers, "CPUExecutionProvider"]

            def io_binding(self) -> Binding:
                return Binding(self.inner.io_binding())

            def run_with_iobinding(self, binding: Binding, options: Any) -> None:
                outer.cuda.cudaStreamSynchronize(outer.device.stream)  # its work comes after what is on the stream
                self.inner.run_with_iobinding(binding.inner, options)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.inner, name)

        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)

    def open(self, graph, **options) -> OnnxRuntimeDeviceSession:
        return OnnxRuntimeDeviceSession(graph.path, graph.spec, self.device, **{"provider": CUDA, **options})


CALLS = (
    feeds([[1, 2, 3], [4, 5, 6]], [0, 0]),
    feeds([[7], [8]], [3, 2]),
    feeds([[9, 0], [1, 1]], [4, 3]),
)


@pytest.mark.parametrize("variant", ["standard", "primitive"])
@pytest.mark.parametrize("on_device", [(), ("logits",)])
@pytest.mark.parametrize("shape_is_known", [True, False])
def test_it_computes_on_the_chains_buffers(language_models, monkeypatch, variant, on_device, shape_is_known):
    graph = language_models[variant]
    if not shape_is_known:  # as of visual tokens, whose number is an expression
        logits, *written = graph.spec.outputs
        logits = dataclasses.replace(logits, dims=("B", 2, "L*2/2", 4))
        graph = dataclasses.replace(graph, spec=dataclasses.replace(graph.spec, outputs=(logits, *written)))
    with OnnxRuntimeSession(graph.path, graph.spec, threads=1) as session:
        cache = session.allocate_cache(batch=2, capacity=16)
        expected = [session.infer(call, cache=cache)["logits"] for call in CALLS]
        kept = cache.read()
    provider = Provider(monkeypatch)
    with provider.open(graph, on_device=on_device) as session:
        cache = session.allocate_cache(batch=2, capacity=16)
        places = [buffer.address for buffer in cache.buffers.values()]
        for call, logits in zip(CALLS, expected, strict=True):
            lent = {"input_ids": provider.device.upload(call["input_ids"])}
            outputs = session.infer({**call, **lent}, cache=cache)
            assert set(outputs) == {"logits"} and isinstance(outputs["logits"], DeviceArray) == bool(on_device)
            np.testing.assert_allclose(np.asarray(outputs["logits"]), logits, atol=1e-6)
        for name, value in cache.read().items():
            np.testing.assert_allclose(value, kept[name], atol=1e-6)
        assert [buffer.address for buffer in cache.buffers.values()] == places
        assert {name for name, device in provider.bound if device == "cpu"} == {"logits"} - set(on_device)
    assert not provider.cuda.allocations and not provider.cuda.events
    with raises("engine.closed"):
        session.infer(CALLS[0], cache=cache)


def test_what_each_provider_is_asked_for(language_models, monkeypatch, tmp_path):
    graph, provider = language_models["standard"], Provider(monkeypatch)
    stream = str(provider.device.stream)
    with provider.open(graph):
        ((name, settings), rest) = provider.asked[-1]
    assert (name, rest, settings["user_compute_stream"]) == (CUDA, "CPUExecutionProvider", stream)
    provider = Provider(monkeypatch)
    with provider.open(graph, provider=TENSORRT, sizes=SIZES, folder=tmp_path / "engines"):
        ((name, settings), _) = provider.asked[-1]
    assert (name, settings["has_user_compute_stream"]) == (TENSORRT, "1")
    assert settings["trt_profile_min_shapes"].startswith("input_ids:1x1,cache_position:1,past_key_0:1x2x16x4")
    assert settings["trt_profile_max_shapes"].startswith("input_ids:4x64,cache_position:4,past_key_0:4x2x64x4")
    assert settings["trt_engine_cache_path"] == str(tmp_path / "engines") and (tmp_path / "engines").is_dir()


def test_the_plugin_is_registered_once_and_given_the_chains_stream(language_models, monkeypatch):
    added, registered = [], []
    plugin = SimpleNamespace(get_ep_name=lambda: "rtx", get_library_path=lambda: "librtx.so")
    found = SimpleNamespace(ep_name="rtx")
    monkeypatch.setitem(sys.modules, PLUGIN, plugin)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [found] if registered else [])
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *names: registered.append(names))

    class Options(onnxruntime.SessionOptions):
        def add_provider_for_devices(self, devices, settings):
            added.append((devices, settings))

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    provider = Provider(monkeypatch)
    provider.device.open()
    for _ in range(2):
        provider.open(language_models["standard"], provider=TENSORRT_RTX, sizes=SIZES).close()
    assert registered == [("rtx", "librtx.so")] and [devices for devices, _ in added] == [[found]] * 2
    assert added[0][1]["user_compute_stream"] == str(provider.device.stream)
    assert added[0][1]["nv_profile_opt_shapes"].startswith("input_ids:1x8")
    monkeypatch.setitem(sys.modules, PLUGIN, None)
    with raises("engine.not_installed", PLUGIN, "pip install onnxruntime"):
        provider.open(language_models["standard"], provider=TENSORRT_RTX)


def test_a_provider_that_onnxruntime_leaves_out_is_told(language_models, monkeypatch, capfd):
    loaded = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append(print("Failed to load libcudnn.so.9")))
    load_cuda.cache_clear()
    for _ in range(2):
        provider = Provider(monkeypatch, left_out=True)
        with raises("engine.not_ready", CUDA, "CPUExecutionProvider", "Failed to load libcudnn.so.9"):
            provider.open(language_models["standard"])
    assert len(loaded) == 1 and not capfd.readouterr().out
    load_cuda.cache_clear()
    assert not provider.cuda.streams


def test_failures_and_foreign_caches(language_models, monkeypatch):
    provider = Provider(monkeypatch)
    with provider.open(language_models["standard"]) as session:
        with raises("engine.failed", "language_model (standard): onnxruntime", "input_ids [1, 2]"):
            session.infer(feeds([[1, 99]], [0]), cache=session.allocate_cache(batch=1, capacity=4))
        with raises("engine.bad_cache", "SimpleNamespace"):
            session.infer(feeds([[1]], [0]), cache=SimpleNamespace(batch=1, capacity=4))
