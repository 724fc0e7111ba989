"""onnxruntime's GPU providers. Tensors that pass between graphs stay on the device.

One session class for three providers: CUDA, TensorRT and NvTensorRtRtx (a plugin package). They run on the chain's
stream and on the same buffers as the native backends, by address; they differ in how each is configured.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.kv_cache import DeviceKVCache, cache_spec, own_cache
from bridge_stg.runtime.backends.onnxruntime_cpu import failure, import_onnxruntime, open_file, session_options
from bridge_stg.runtime.backends.session import KVCache, Preferences, check_feeds
from bridge_stg.runtime.bundle.manifest import GraphSpec, TensorSpec
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.array_ops import Array, accept
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import DEVICE
from bridge_stg.runtime.device.staging import Staging
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.packages import install_command
from bridge_stg.runtime.host.threads import Closable, UseCount

CUDA, TENSORRT, TENSORRT_RTX = "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""The package that adds the NvTensorRtRtx provider to onnxruntime."""

Span = tuple[int, int, int]


class OnnxRuntimeDeviceSession(Closable):
    """A graph on one of onnxruntime's GPU providers. See `session.Session` and `TensorRTSession`.

    Args:
        path: the .onnx file, already checked by `Bundle.load`.
        graph: its manifest entry.
        device: the chain's device.
        provider: `CUDA`, `TENSORRT` or `TENSORRT_RTX`.
        threads: CPU threads for nodes that the provider leaves to the CPU.
        on_device: outputs that are returned as `DeviceArray`; the others come as numpy arrays.
        sizes: minimum, optimal and maximum size of each symbol, for the two that compile for ranges of shapes.
        folder: cache folder of the two that compile; None: no cache.

    Raises:
        EngineError: the provider is missing, or onnxruntime rejects the file.
    """

    preferences = Preferences()

    def __init__(
        self,
        path: str | os.PathLike[str],
        graph: GraphSpec,
        device: DeviceContext,
        *,
        provider: str,
        threads: int | None = None,
        on_device: Collection[str] = (),
        sizes: Mapping[str, Span] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.graph, self._on_device = graph, frozenset(on_device)
        options = session_options(threads)
        self.device, load_problem = device.open(), ""
        try:
            settings = provider_settings(provider, graph, device, sizes or {}, folder)
            if provider == TENSORRT_RTX:
                _add_plugin(options, settings)
                arguments: dict[str, Any] = {}
            else:
                load_problem = load_cuda()
                arguments = {"providers": [(provider, settings), "CPUExecutionProvider"]}
            self._session: Any = open_file(path, graph, options, **arguments)
            if (found := self._session.get_providers())[0] == "CPUExecutionProvider":
                message = f"{graph}: onnxruntime cannot load {provider}, only {found[0]}. Its libraries (CUDA, "
                message += "cuDNN, TensorRT) are missing or have the wrong version"
                message += f" ({load_problem}). Install them: {install_command('gpu')}; see `python cli.py doctor`"
                raise EngineError("engine.not_ready", message)
        except BaseException:
            self.device.close()
            raise
        self._run_options = import_onnxruntime().RunOptions()
        self._run_options.log_severity_level = 4
        self._staging = Staging(device, overlap=False)
        closed = EngineError("engine.closed", f"{graph}: this session is closed.")
        self._usage = UseCount(self._free, closed_error=closed)

    def allocate_cache(self, *, batch: int, capacity: int) -> DeviceKVCache:
        """See `Session.allocate_cache`."""
        spec = cache_spec(self.graph)
        with self._usage.call():
            return DeviceKVCache(self.device, spec, batch=batch, capacity=capacity)

    def infer(self, feeds: Mapping[str, Array], *, cache: KVCache | None = None) -> dict[str, Array]:
        """See `Session.infer`."""
        with self._usage.call():
            kv = own_cache(self.graph, cache, DeviceKVCache, self.device)
            feeds = {name: accept(value, self.device) for name, value in feeds.items()}
            symbols = check_feeds(self.graph, feeds, kv)
            try:
                with self.device.lock:
                    return self._run(feeds, symbols, kv)
            except EngineError:
                raise
            except Exception as error:  # onnxruntime's own exceptions share no base class
                code = "engine.out_of_memory" if "llocate" in str(error) else "engine.failed"  # on the device
                raise EngineError(code, failure(self.graph, feeds, symbols, error)) from error

    def _run(
        self, feeds: Mapping[str, Array], symbols: Mapping[str, int], cache: DeviceKVCache | None
    ) -> dict[str, Array]:
        contract, binding = self.graph.cache, self._session.io_binding()
        addresses = self._staging.send({n: array for n, array in feeds.items() if isinstance(array, np.ndarray)})
        resident = {n: array.as_contiguous() for n, array in feeds.items() if isinstance(array, DeviceArray)}
        addresses |= {name: array.address for name, array in resident.items()}
        for name, array in feeds.items():
            binding.bind_input(name, "cuda", DEVICE, np.dtype(array.dtype), list(array.shape), addresses[name])
        written: dict[str, str] = {}  # output of the cache → its buffer
        if cache is not None and contract is not None:
            written = dict(zip(contract.written_names, contract.past_names, strict=True))
            for name, buffer in cache.buffers.items():
                binding.bind_input(name, "cuda", DEVICE, buffer.dtype, list(buffer.shape), buffer.address)
        outputs: dict[str, DeviceArray] = {}
        for tensor in self.graph.outputs:
            place = self._place(tensor, symbols, cache, written)
            if place is not None:
                outputs[tensor.name] = place
                binding.bind_output(tensor.name, "cuda", DEVICE, place.dtype, list(place.shape), place.address)
            else:
                stays = tensor.name in self._on_device or tensor.name in written
                binding.bind_output(tensor.name, "cuda" if stays else "cpu", DEVICE if stays else 0)
        self._session.run_with_iobinding(binding, self._run_options)
        binding.synchronize_outputs()
        results = dict(zip((t.name for t in self.graph.outputs), binding.get_outputs(), strict=True))
        if cache is not None and contract is not None and contract.update == "append":
            cache.append({past: outputs[new] for new, past in written.items()}, np.asarray(feeds["cache_position"]))
        return {n: self._returned(n, value, outputs.get(n)) for n, value in results.items() if n not in written}

    def _place(
        self,
        tensor: TensorSpec,
        symbols: Mapping[str, int],
        cache: DeviceKVCache | None,
        written: Mapping[str, str],
    ) -> DeviceArray | None:
        """Return the memory for an output that stays on the device; None if its shape is not known before."""
        if tensor.name in written and cache is not None and self.graph.cache is not None:
            if self.graph.cache.update == "in_place":
                return cache.buffers[written[tensor.name]]
        elif tensor.name not in self._on_device:
            return None
        if any(isinstance(dim, str) and dim not in symbols for dim in tensor.dims):
            return None
        return self.device.empty([d if isinstance(d, int) else symbols[d] for d in tensor.dims], tensor.dtype)

    def _returned(self, name: str, value: Any, place: DeviceArray | None) -> Array:
        if name not in self._on_device:
            array: np.ndarray = value.numpy()
            return array
        if place is not None:
            return place
        dtype = next(tensor.dtype for tensor in self.graph.outputs if tensor.name == name)
        return DeviceArray(self.device, value, tuple(value.shape()), dtype, address=value.data_ptr())

    def _free(self) -> None:
        with self.device.lock:
            self.device.cuda("cudaDeviceSynchronize")
            self._staging.close()
            self._session = None
        self.device.close()


@cache
def load_cuda() -> str:
    """Load the CUDA and cuDNN libraries of wheels, which onnxruntime does not find; return what failed, as text.

    A library that no wheel contains is searched among the libraries of the system.
    """
    load = getattr(import_onnxruntime(), "preload_dlls", None)  # since onnxruntime 1.21
    output = io.StringIO()
    if load is not None:
        with contextlib.redirect_stdout(output):  # it prints what it cannot load
            load()
    return "; ".join(line.strip() for line in output.getvalue().splitlines() if line.strip()) or "all were loaded"


def provider_settings(
    provider: str, graph: GraphSpec, device: DeviceContext, sizes: Mapping[str, Span], folder: Path | None
) -> dict[str, str]:
    """Return a provider's options: the chain's stream, and shapes and caches of those that compile."""
    settings = {"device_id": str(DEVICE), "user_compute_stream": str(device.stream)}
    if provider == CUDA:
        # The arena grows by what is needed, not by doubling.
        return settings | {"arena_extend_strategy": "kSameAsRequested", "do_copy_in_default_stream": "1"}
    prefix = "trt" if provider == TENSORRT else "nv"
    settings["has_user_compute_stream"] = "1"
    for place, name in enumerate(("min", "opt", "max")):
        shapes = [
            f"{t.name}:" + "x".join(str(d if isinstance(d, int) else sizes[d][place]) for d in t.dims)
            for t in graph.inputs
            if all(isinstance(d, int) or d in sizes for d in t.dims)
        ]
        if shapes:
            settings[f"{prefix}_profile_{name}_shapes"] = ",".join(shapes)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if provider == TENSORRT:
            settings |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
            settings |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(folder)}
        else:
            settings["nv_runtime_cache_path"] = str(folder)
    return settings


def _add_plugin(options: Any, settings: Mapping[str, str]) -> None:
    """Register the NvTensorRtRtx plugin once per process, and add its device to a session's options."""
    ort = import_onnxruntime()
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as error:
        message = f"{PLUGIN} cannot be imported ({error}). Install it: pip install onnxruntime-ep-nv-tensorrt-rtx"
        raise EngineError("engine.not_installed", message) from error
    name = plugin.get_ep_name()
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        ort.register_execution_provider_library(name, plugin.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise EngineError("engine.no_device", f"{PLUGIN} finds no device: it needs an RTX GPU (Ampere or later)")
    options.add_provider_for_devices(devices[:1], dict(settings))
