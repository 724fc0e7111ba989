"""The onnxruntime backend. Nothing else in the runtime touches onnxruntime, and it is imported on first use only."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import KVCache, Preferences, check_feeds, rows_to_fill
from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.cpus import MAX_THREADS, limited_threads

_DTYPES = {"float": "float32", "double": "float64"}  # onnxruntime's names that are not numpy's
_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_FATAL_ONLY = 4  # log severity; a failure is raised as well, and a second copy on stderr helps nobody
_environment = threading.Lock()
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class NumpyKVCache:
    """KV buffers in numpy memory, seen by onnxruntime through OrtValues over the same memory."""

    def __init__(self, spec: CacheSpec, *, batch: int, capacity: int) -> None:
        if batch < 1 or capacity < 1:
            raise EngineError(f"a KV cache needs at least one row and one position, not {batch} rows of {capacity}")
        ort = import_onnxruntime()
        shape = (batch, spec.kv_heads, capacity, spec.head_dim)
        try:
            self.buffers = {name: np.zeros(shape, spec.dtype) for name in spec.past_names}
        except MemoryError as error:
            raise EngineError(f"no memory for a KV cache of {batch} rows of {capacity} positions: {error}") from error
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(buffer) for name, buffer in self.buffers.items()}
        self.batch, self.capacity = batch, capacity

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def copy_prefix(self, source: KVCache, length: int, rows: Sequence[int] | None = None) -> None:
        """See `KVCache.copy_prefix`."""
        if not isinstance(source, NumpyKVCache):
            raise EngineError(f"a KV cache of onnxruntime cannot be filled from a {type(source).__name__}")
        chosen = rows_to_fill(self, source, length, rows)
        for name, buffer in self.buffers.items():
            other = source.buffers[name]
            if (other.dtype, other.shape[1], other.shape[3]) != (buffer.dtype, buffer.shape[1], buffer.shape[3]):
                raise EngineError(f"KV caches of different graphs: {name} is {other.dtype} {other.shape} in the source")
            for i, row in enumerate(chosen):
                buffer[row, :, :length] = other[i if source.batch > 1 else 0, :, :length]

    def read(self) -> dict[str, np.ndarray]:
        """See `KVCache.read`."""
        return {name: buffer.copy() for name, buffer in self.buffers.items()}

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """See `KVCache.write`."""
        for name, buffer in self.buffers.items():
            value = values.get(name)
            if value is None or value.shape != buffer.shape or value.dtype != buffer.dtype:
                found = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
                raise EngineError(f"KV cache: {name} is {found}, expected {buffer.dtype} {list(buffer.shape)}")
        for name, buffer in self.buffers.items():
            buffer[...] = values[name]  # into the same memory: the OrtValues look at it

    def append(self, new: Mapping[str, np.ndarray], positions: np.ndarray) -> None:
        """Write rows [B, kv_heads, L, head_dim] by past name, row b from `positions[b]` on."""
        for name, buffer in self.buffers.items():
            rows = new[name]
            for b, start in enumerate(positions.tolist()):
                buffer[b, :, start : start + rows.shape[2]] = rows[b]


class OnnxRuntimeSession:
    """A graph on onnxruntime's CPU provider. See `session.Session` for the contract.

    Args:
        path: the .onnx file, already checked by `Bundle.load`.
        graph: its manifest entry, to which names, dtypes and dims of the file are compared.
        threads: threads of one call; None: one a physical core that this process may use (see cpus.py).
        lean: cast and lay out weights at every call, not once: slower, and no second copy of them in memory.
        weights: the folder of its external data, where that is not the file's own.

    Raises:
        EngineError: onnxruntime is missing or refuses the file, or the file does not fit the manifest.
    """

    device = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        graph: GraphSpec,
        *,
        threads: int | None = None,
        lean: bool = False,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        if graph.precision == "bf16":
            raise EngineError(
                f"{graph}: is bf16, in which onnxruntime cannot compute on CPU. Export the checkpoint with "
                "--dtype fp16 or fp32 to run it here; TensorRT takes this one"
            )
        options = session_options(threads)
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if weights is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, os.fspath(weights))
        self.graph = graph
        self._run_options = import_onnxruntime().RunOptions()
        self._run_options.log_severity_level = _FATAL_ONLY
        # The arena gives back what one long call needed, instead of holding it for good; short calls cost the same.
        self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session: Any = open_file(
            path,
            graph,
            options,
            from_bytes=weights is not None,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if lean else None,
        )
        optional = frozenset(node.name for node in self._session.get_overridable_initializers())
        # With fewer tokens or patches matmuls are slower; with more, their results no longer fit the CPU's caches, and
        # attention scores more keys that follow a token.
        self.preferences = Preferences(prefill_chunk=256, encoder_patches=1024, optional_inputs=optional)

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """See `Session.close`. A call that is running in another thread ends well."""
        self._session = None

    def allocate_cache(self, *, batch: int, capacity: int) -> NumpyKVCache:
        """See `Session.allocate_cache`."""
        if self.graph.cache is None:
            raise EngineError(f"{self.graph}: keeps no KV cache, so none can be allocated.")
        return NumpyKVCache(self.graph.cache, batch=batch, capacity=capacity)

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, np.ndarray]:
        """See `Session.infer`."""
        session = self._session
        if session is None:
            raise EngineError(f"{self.graph}: this session is closed.")
        if cache is not None and not isinstance(cache, NumpyKVCache):
            raise EngineError(f"{self.graph}: a KV cache of type {type(cache).__name__} is another backend's.")
        # What another backend left on a device is fetched: a chain may run one of its graphs here.
        feeds = {n: array.numpy() if isinstance(array, DeviceArray) else array for n, array in feeds.items()}
        optional = self.preferences.optional_inputs
        contract_feeds = {n: array for n, array in feeds.items() if n not in optional}
        symbols = check_feeds(self.graph, contract_feeds, cache)
        in_place = self._in_place(cache)
        binding = session.io_binding()
        held = {name: array if array.flags.c_contiguous else array.copy() for name, array in feeds.items()}
        try:
            for name, array in held.items():
                if name in optional:  # which `bind_cpu_input` does not know
                    binding.bind_ortvalue_input(name, import_onnxruntime().OrtValue.ortvalue_from_numpy(array))
                else:
                    binding.bind_cpu_input(name, array)  # no copy: `held` keeps the memory alive
            if cache is not None:
                for name, value in cache.values.items():
                    binding.bind_ortvalue_input(name, value)
            for tensor in self.graph.outputs:
                if cache is not None and tensor.name in in_place:
                    binding.bind_ortvalue_output(tensor.name, cache.values[in_place[tensor.name]])
                else:
                    binding.bind_output(tensor.name, "cpu")
            session.run_with_iobinding(binding, self._run_options)
            results = zip(self.graph.outputs, binding.get_outputs(), strict=True)
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise EngineError(failure(self.graph, feeds, symbols, error)) from error
        outputs = {tensor.name: value.numpy() for tensor, value in results if tensor.name not in in_place}
        contract = self.graph.cache
        if cache is not None and contract is not None and contract.update == "append":
            pairs = zip(contract.past_names, contract.written_names, strict=True)
            cache.append({past: outputs.pop(new) for past, new in pairs}, feeds["cache_position"])
        return outputs

    def _in_place(self, cache: NumpyKVCache | None) -> dict[str, str]:
        """Outputs of this call that share the buffer of an input: present_* → past_*."""
        contract = self.graph.cache
        if cache is None or contract is None or contract.update != "in_place":
            return {}
        return dict(zip(contract.written_names, contract.past_names, strict=True))


def session_options(threads: int | None) -> Any:
    """Return what every session is opened with. Raises EngineError for a number of threads that is none."""
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
        raise EngineError(f"threads is {threads!r}, expected a whole number from 1 to {MAX_THREADS}")
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads or limited_threads() or 0
    # Each session has threads of its own: those of the graph before would keep a core from those of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.inter_op_num_threads = 1
    # One memory plan is kept for every set of input shapes, and shapes differ from call to call here.
    options.enable_mem_pattern = False
    return options


def open_file(
    path: str | os.PathLike[str], graph: GraphSpec, options: Any, *, from_bytes: bool = False, **arguments: Any
) -> Any:
    """Return onnxruntime's session of a file whose inputs and outputs are those of the manifest.

    Args:
        from_bytes: hand over the file's bytes: its external data lie in the folder that `options` name.

    Raises:
        EngineError: onnxruntime refuses the file, or the file does not fit the manifest.
    """
    ort = import_onnxruntime()
    try:
        model = Path(path).read_bytes() if from_bytes else str(Path(path))
        with _scores_of_whole_rows():
            session = ort.InferenceSession(model, sess_options=options, **arguments)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        message = f"{graph}: onnxruntime {ort.__version__} rejects {path}: {_one_line(error)}"
        raise EngineError("engine.rejected_graph", message) from error
    _check_contract(graph, session, str(path))
    return session


@contextmanager
def _scores_of_whole_rows() -> Iterator[None]:
    """Let GroupQueryAttention of a session that is opened now score all keys of a chunk's tokens at once.

    Its tiles score keys in blocks of a thousand, which a short chunk does not fill. An environment variable is the only
    switch; whoever has set it is left to it.
    """
    with _environment:
        if _FLASH in os.environ:
            yield
            return
        os.environ[_FLASH] = "1"
        try:
            yield
        finally:
            del os.environ[_FLASH]


def failure(graph: GraphSpec, feeds: Mapping[str, Any], symbols: Mapping[str, int], error: Exception) -> str:
    """Say which call of onnxruntime failed, and how."""
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
    dims = ", ".join(f"{symbol} = {size}" for symbol, size in symbols.items())
    return f"{graph}: onnxruntime failed with {shapes} ({dims}): {_one_line(error)}"


def _check_contract(graph: GraphSpec, session: Any, path: str) -> None:
    """Compare the file's inputs and outputs with the manifest. A dim may be freer in the file, never narrower."""
    for kind, listed, nodes in (
        ("input", graph.inputs, session.get_inputs()),
        ("output", graph.outputs, session.get_outputs()),
    ):
        found = {node.name: node for node in nodes}
        if set(found) != {tensor.name for tensor in listed}:
            names = ", ".join(sorted(set(found) ^ {tensor.name for tensor in listed}))
            raise EngineError(f"{graph}: the {kind}s of {path} are not those of the manifest; they differ in: {names}.")
        for tensor in listed:
            node = found[tensor.name]
            inner = node.type.removeprefix("tensor(").removesuffix(")")
            dtype = _DTYPES.get(inner, inner)
            # onnxruntime may not know an output's shape; an input's is always written in the file.
            unknown = kind == "output" and not node.shape
            if dtype != tensor.dtype or not (unknown or _fits(node.shape, tensor.dims)):
                found_as = f"{dtype} {node.shape}"
                raise EngineError(f"{graph}: {kind} {node.name!r} of {path} is {found_as}; the manifest says {tensor}.")


def _fits(shape: Sequence[int | str | None], dims: Sequence[int | str]) -> bool:
    if len(shape) != len(dims):
        return False
    return all(not isinstance(size, int) or size == dim for size, dim in zip(shape, dims, strict=True))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:499]}…"


def import_onnxruntime() -> Any:
    """Return the package. Raises EngineError where it cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f'the package onnxruntime cannot be imported ({error}). Install it with: pip install "bridge-stg[cpu]"'
        ) from error
    onnxruntime.disable_telemetry_events()  # its wheels can record events, and nothing here calls anywhere
    return onnxruntime
