"""A graph on native TensorRT or TensorRT-RTX. Tensors that pass between graphs stay on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.kv_cache import DeviceKVCache, cache_spec, own_cache
from bridge_stg.runtime.backends.session import KVCache, Preferences, check_feeds, describe_call
from bridge_stg.runtime.backends.tensorrt.cuda_graphs import PreparedCall, StepGraphs
from bridge_stg.runtime.backends.tensorrt.engine import TensorRTEngine, tensor_shape
from bridge_stg.runtime.backends.tensorrt.library import TensorRT
from bridge_stg.runtime.bundle.manifest import GraphSpec, TensorSpec
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array import DeviceArray, download
from bridge_stg.runtime.device.array_ops import Array, accept
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.memory import ALIGNMENT
from bridge_stg.runtime.device.staging import Staging
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.threads import Closable, UseCount

PARTS = ("B", "G")
"""Symbols along which a call is split where no profile takes all of it: rows, and groups of frames."""


class TensorRTSession(Closable):
    """A TensorRT engine as a `session.Session`.

    Inputs may be numpy arrays, arrays of other sessions of the chain, or arrays that support DLPack on this device; the
    latter two are read in place. The ranges of `graph` are those of the engine's profiles.

    Args:
        plan: the serialized engine, or its file.
        graph: the manifest entry that it was built from.
        device: the chain's device.
        library: the TensorRT package.
        on_device: outputs that are returned as `DeviceArray`; the others come as numpy arrays.
        cuda_graphs: whether steps with a cache that repeat are captured as CUDA graphs.
        kernels: file of the kernels that TensorRT-RTX compiled on this device; written when the session is closed.

    Raises:
        EngineError: TensorRT rejects the engine, or it does not fit the manifest.
    """

    preferences = Preferences()

    def __init__(
        self,
        plan: bytes | Path,
        graph: GraphSpec,
        device: DeviceContext,
        library: TensorRT,
        *,
        on_device: Collection[str] = (),
        cuda_graphs: bool = True,
        kernels: Path | None = None,
    ) -> None:
        known = kernels.read_bytes() if library.is_rtx and kernels is not None and kernels.is_file() else None
        keeps_cache = graph.cache is not None
        self.device = device.open()
        try:
            self._engine = TensorRTEngine(
                library, device, plan, graph, cuda_graphs=cuda_graphs and keeps_cache, kernels=known
            )
            self._swaps_buffers = self._check_cache(graph)
        except BaseException:
            device.close()
            raise
        self.graph = dataclasses.replace(graph, ranges={**graph.ranges, **self._engine.ranges})
        self._on_device = frozenset(on_device)
        self._kernels, self._known_kernels = kernels, known
        self._staging = Staging(device, overlap=not keeps_cache)
        # TensorRT-RTX captures repeated steps itself.
        self.graphs = StepGraphs(device) if keeps_cache and cuda_graphs and not library.is_rtx else None
        closed = EngineError("engine.closed", f"{self.graph}: this session is closed.")
        self._usage = UseCount(self._free, closed_error=closed)

    def allocate_cache(self, *, batch: int, capacity: int) -> DeviceKVCache:
        """See `Session.allocate_cache`. The capacity may be larger than requested: an engine's may be fixed."""
        spec = cache_spec(self.graph)
        least, most = self.graph.ranges.get("S", (1, None))
        if most is not None and capacity > most:
            message = f"{self.graph}: a KV cache of {capacity} positions is larger than this engine's {most}"
            advice = "Build it with a larger capacity, or use a shorter video (--max-visual-tokens)"
            raise EngineError("engine.out_of_range", f"{message}. {advice}")
        with self._usage.call():
            return DeviceKVCache(self.device, spec, batch=batch, capacity=max(capacity, least))

    def infer(self, feeds: Mapping[str, Array], *, cache: KVCache | None = None) -> dict[str, Array]:
        """See `Session.infer`."""
        with self._usage.call():
            contract = self.graph.cache
            kv = own_cache(self.graph, cache, DeviceKVCache, self.device)
            feeds = {name: accept(value, self.device) for name, value in feeds.items()}
            if cache is None and contract is not None and contract.update == "in_place":
                return self._infer_with_past(feeds)
            sizes = check_feeds(self.graph, feeds, kv)
            try:
                with self.device.lock:
                    outputs = self._run_in_parts(feeds, sizes, kv)
                host = [name for name in outputs if name not in self._on_device]
                landed = dict(zip(host, download([outputs[name] for name in host]), strict=True))
            except EngineError as error:
                call = describe_call(feeds, sizes)
                message = f"{self.graph}: failed on {self.device.device.name} with {call}: {error}"
                raise EngineError(error.code, message) from error
            return {name: landed.get(name, array) for name, array in outputs.items()}

    def _run_in_parts(
        self, feeds: Mapping[str, Array], sizes: Mapping[str, int], cache: DeviceKVCache | None
    ) -> dict[str, DeviceArray]:
        """Run a call, in several parts if no profile takes all of its rows (B) or groups of frames (G) at once."""
        for symbol in PARTS:
            most = self._engine.largest_part(symbol, sizes) if symbol in sizes else None
            if most is None or most >= sizes[symbol]:
                continue
            parts = []
            for start in range(0, sizes[symbol], most):
                stop = min(start + most, sizes[symbol])
                part = {n: _part(a, self._axes(symbol).get(n), start, stop) for n, a in feeds.items()}
                part_sizes = {**sizes, symbol: stop - start}
                parts.append(self._run_rows(part, part_sizes, cache, start if symbol == "B" else 0))
            axes = {tensor.name: _axis(tensor, symbol) for tensor in self.graph.outputs}
            return {name: arrays.join([p[name] for p in parts], axis=axes[name] or 0) for name in parts[0]}
        return self._run(feeds, sizes, cache)

    def _axes(self, symbol: str) -> dict[str, int | None]:
        return {tensor.name: _axis(tensor, symbol) for tensor in self.graph.inputs}

    def _run_rows(
        self, feeds: Mapping[str, Array], sizes: Mapping[str, int], cache: DeviceKVCache | None, start: int
    ) -> dict[str, DeviceArray]:
        """Run a call on some rows of a cache."""
        if cache is None:
            return self._run(feeds, sizes, cache)
        rows = cache.rows(start, start + sizes["B"])
        views = dict(rows.buffers)
        if any(buffer.address % ALIGNMENT for buffer in rows.buffers.values()):
            rows.buffers = {name: buffer.copy() for name, buffer in views.items()}
        outputs = self._run(feeds, sizes, rows)
        for name, buffer in rows.buffers.items():
            if buffer.address != views[name].address:
                views[name].write(buffer)
        return outputs

    def _run(
        self, feeds: Mapping[str, Array], sizes: Mapping[str, int], cache: DeviceKVCache | None
    ) -> dict[str, DeviceArray]:
        """Put a call on the stream; return its outputs, which are valid in the order of the stream."""
        contract, profile = self.graph.cache, self._engine.profile_for(sizes)
        shapes = {tensor.name: tensor_shape(tensor, sizes) for tensor in self.graph.inputs}
        addresses = self._staging.send({n: array for n, array in feeds.items() if isinstance(array, np.ndarray)})
        on_device = {n: array for n, array in feeds.items() if isinstance(array, DeviceArray)}
        # TensorRT needs contiguous and aligned arrays.
        resident = {n: a if a.contiguous and not a.address % ALIGNMENT else a.copy() for n, a in on_device.items()}
        addresses |= {name: array.address for name, array in resident.items()}
        written: dict[str, str] = {}  # output of the cache → its buffer
        if cache is not None and contract is not None:
            written = dict(zip(contract.written_names, contract.past_names, strict=True))
            addresses |= {past: buffer.address for past, buffer in cache.buffers.items()}
            if contract.update == "in_place" and not self._swaps_buffers:
                addresses |= {present: addresses[past] for present, past in written.items()}
        repeats = cache is not None and not self._swaps_buffers
        outputs = self._execute(profile, shapes, addresses, repeats=repeats)
        self._staging.mark_used()
        if resident:
            self.device.keep_alive(*resident.values())  # other libraries do not know this stream
        if cache is not None and contract is not None and contract.update == "append":
            cache.append({past: outputs[new] for new, past in written.items()}, np.asarray(feeds["cache_position"]))
        elif cache is not None and self._swaps_buffers:
            cache.buffers.update({past: outputs[present] for present, past in written.items()})
        return {name: array for name, array in outputs.items() if name not in written}

    def _execute(
        self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: dict[str, int], *, repeats: bool
    ) -> dict[str, DeviceArray]:
        """Run the engine, by a captured CUDA graph if the step repeats; return the outputs that have no address yet."""
        graphs = self.graphs if repeats else None
        if graphs is None:
            return dict(self._prepare(self._engine.context(profile), shapes, addresses, execute=True).outputs)
        scratch = self._engine.scratch(profile).address
        key = (profile, scratch, tuple(shapes.items()), tuple(sorted(addresses.items())))
        outputs = graphs.launch(key)
        if outputs is None:
            context = self._context_to_capture(graphs, profile) if graphs.repeats(key) else None
            if context is None:
                return dict(self._prepare(self._engine.context(profile), shapes, addresses, execute=True).outputs)
            outputs = graphs.run_and_capture(key, self._prepare(context, shapes, addresses, execute=False))
        # The graph writes to the same memory again when the step is repeated.
        return {name: array.copy() for name, array in outputs.items()}

    def _context_to_capture(self, graphs: StepGraphs, profile: int) -> Any:
        """Return a context for a new CUDA graph; None if the device has no memory for one."""
        try:
            return self._engine.new_context(profile)
        except EngineError as error:  # steps run without graphs from now on
            graphs.capture_error = str(error)
            return None

    def _prepare(
        self, context: Any, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int], *, execute: bool
    ) -> PreparedCall:
        dtypes = {tensor.name: tensor.dtype for tensor in self.graph.outputs}
        found = context.output_shapes(shapes)
        outputs = {n: self.device.empty(shape, dtypes[n]) for n, shape in found.items() if n not in addresses}
        context.bind({**addresses, **{name: array.address for name, array in outputs.items()}})
        if execute:
            context.execute(self.device.stream)
        return PreparedCall(context.execute, context.capturable, outputs, holds=context.scratch)

    def _infer_with_past(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph that updates its cache in place on past_* inputs, and return the updated buffers."""
        contract = self.graph.cache
        assert contract is not None
        check_feeds(self.graph, feeds)
        past = {name: np.asarray(feeds[name]) for name in contract.past_names}
        batch, _, capacity, _ = past[contract.past_names[0]].shape
        cache = self.allocate_cache(batch=batch, capacity=capacity)
        cache.write(past)
        outputs = self.infer({n: array for n, array in feeds.items() if n not in past}, cache=cache)
        kept = cache.read()
        return outputs | {new: kept[old] for new, old in zip(contract.written_names, contract.past_names, strict=True)}

    def _check_cache(self, graph: GraphSpec) -> bool:
        """Compare the outputs that the engine writes over inputs with the cache's contract.

        Returns:
            Whether the engine writes new buffers although the contract allows in-place updates; they replace the old.
        """
        found = self._engine.aliases()
        if found is None:
            return False
        contract, expected = graph.cache, {}
        if contract is not None and contract.update == "in_place":
            expected = dict(zip(contract.written_names, contract.past_names, strict=True))
        if found and found != expected:
            name = sorted(set(found.items()) ^ set(expected.items()))[0][0]
            over, listed = (pairs.get(name, "no input") for pairs in (found, expected))
            message = f"{graph}: the engine writes {name!r} over {over!r}, and the manifest says {listed!r}"
            raise EngineError("engine.rejected_engine", f"{message}. Build the engine again from this bundle")
        return bool(expected) and not found

    def _free(self) -> None:
        with self.device.lock:
            self.device.cuda("cudaDeviceSynchronize")
            if self.graphs is not None:
                self.graphs.close()
            self._staging.close()
            made = self._engine.kernel_cache()
            self._engine.close()
        try:
            if self._kernels is not None and made and made != self._known_kernels:
                with replacing(self._kernels) as temporary:
                    temporary.write_bytes(made)
        except OSError:
            pass  # a read-only folder: the next process compiles again
        finally:
            self.device.close()


def _axis(tensor: TensorSpec, symbol: str) -> int | None:
    """Return the axis of a tensor that grows with a symbol, such as 1 of [3, B, L] for B; None if no axis does."""
    words = [str(dim).split("*")[0] for dim in tensor.dims]
    return words.index(symbol) if symbol in words else None


def _part(array: Array, axis: int | None, start: int, stop: int) -> Array:
    return array if axis is None else array[(slice(None),) * axis + (slice(start, stop),)]
