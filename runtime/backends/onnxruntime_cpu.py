"""The onnxruntime backend on CPU. onnxruntime is imported on first use."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.kv_cache import BufferedCache, cache_spec, own_cache
from bridge_stg.runtime.backends.session import KVCache, Preferences, check_feeds, describe_call
from bridge_stg.runtime.bundle.contracts import DECODE
from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.cpus import MAX_THREADS, limited_threads
from bridge_stg.runtime.host.packages import install_command

DECODE_TOKENS = 4
"""Most tokens of all rows for which weights in blocks are faster than int8 per channel: equal at about 8."""
DECODE_ROWS = 16
"""The same for one token per row, whose attention is faster too."""

_DTYPES = {"float": "float32", "double": "float64"}  # onnxruntime's names that are not numpy's
_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_FATAL_ONLY = 4  # log severity; other failures are raised, and need no second copy on stderr
_environment = threading.Lock()
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class NumpyKVCache(BufferedCache[np.ndarray]):
    """KV buffers in numpy memory, and OrtValues over the same memory."""

    def __init__(self, spec: CacheSpec, *, batch: int, capacity: int) -> None:
        super().__init__(spec, batch=batch, capacity=capacity, zeros=np.zeros)
        from_numpy = import_onnxruntime().OrtValue.ortvalue_from_numpy
        self.values = {name: from_numpy(buffer) for name, buffer in self.buffers.items()}


class OnnxRuntimeSession(AbstractContextManager["OnnxRuntimeSession"]):
    """A graph on onnxruntime's CPU provider. See `session.Session` for the contract.

    Args:
        path: the .onnx file, already checked by `Bundle.load`.
        graph: its manifest entry; names, dtypes and dims of the file must be equal.
        threads: threads per call; None: one per physical core that this process may use (see cpus.py).
        low_memory: convert weights at every call instead of once: slower, without a second copy of them in memory.
        weights: folder of the external data; None: the file's folder.
        few: file and manifest entry of the same graph for small calls, see `DECODE_TOKENS`; None: this one.

    Raises:
        EngineError: onnxruntime is missing or rejects the file, or the file does not fit the manifest.
    """

    device = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        graph: GraphSpec,
        *,
        threads: int | None = None,
        low_memory: bool = False,
        weights: str | os.PathLike[str] | None = None,
        few: tuple[str | os.PathLike[str], GraphSpec] | None = None,
    ) -> None:
        self._few = None if few is None else OnnxRuntimeSession(*few, threads=threads, low_memory=low_memory)
        if graph.precision == "bf16":
            message = f"{graph}: is bf16, which onnxruntime cannot run on CPU; use TensorRT, or --dtype fp16 or fp32"
            raise EngineError("engine.no_variant", message)
        options = session_options(threads)
        if low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if weights is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, os.fspath(weights))
        self.graph = graph
        self._run_options = import_onnxruntime().RunOptions()
        self._run_options.log_severity_level = _FATAL_ONLY
        # The arena returns the memory of one long call instead of keeping it; short calls cost the same.
        self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session: Any = open_file(
            path,
            graph,
            options,
            from_bytes=weights is not None,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # the fallback would try the same again, and print
            # Folding would write a transposed copy of each weight, which the matmul packs again. Weights of other
            # precisions are converted by it.
            disabled_optimizers=["ConstantFolding"] if low_memory or graph.precision == "fp32" else None,
        )
        optional = frozenset(node.name for node in self._session.get_overridable_initializers())
        # With fewer tokens or patches matmuls are slower; with more, their results no longer fit the CPU's caches, and
        # attention scores more keys that follow a token.
        self.preferences = Preferences(prefill_chunk=256, encoder_patches=1024, optional_inputs=optional)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """See `Session.close`. Calls that run in other threads finish."""
        self._session = None
        if self._few is not None:
            self._few.close()

    def allocate_cache(self, *, batch: int, capacity: int) -> NumpyKVCache:
        """See `Session.allocate_cache`."""
        return NumpyKVCache(cache_spec(self.graph), batch=batch, capacity=capacity)

    def infer(self, feeds: Mapping[str, Array], *, cache: KVCache | None = None) -> dict[str, Any]:
        """See `Session.infer`."""
        if self._few is not None and _is_small(feeds):
            return self._few.infer(feeds, cache=cache)
        session = self._session
        if session is None:
            raise EngineError("engine.closed", f"{self.graph}: this session is closed.")
        kv = own_cache(self.graph, cache, NumpyKVCache)
        # Arrays that another backend left on a device are downloaded: a chain may run one of its graphs here.
        arrays = {name: array.numpy() if isinstance(array, DeviceArray) else array for name, array in feeds.items()}
        optional = self.preferences.optional_inputs
        symbols = check_feeds(self.graph, {n: array for n, array in arrays.items() if n not in optional}, kv)
        arrays = {name: array if array.flags.c_contiguous else array.copy() for name, array in arrays.items()}
        try:
            binding = self._bind(session.io_binding(), arrays, kv)
            session.run_with_iobinding(binding, self._run_options)
            results = zip(self.graph.outputs, binding.get_outputs(), strict=True)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise EngineError("engine.failed", failure(self.graph, feeds, symbols, error)) from error
        in_place, contract = self._in_place(kv), self.graph.cache
        outputs = {tensor.name: value.numpy() for tensor, value in results if tensor.name not in in_place}
        if kv is not None and contract is not None and contract.update == "append":
            pairs = zip(contract.past_names, contract.written_names, strict=True)
            kv.append({past: outputs.pop(new) for past, new in pairs}, arrays["cache_position"])
        return outputs

    def _bind(self, binding: Any, arrays: Mapping[str, np.ndarray], cache: NumpyKVCache | None) -> Any:
        """Bind inputs and outputs without a copy; `arrays` must stay alive during the run."""
        for name, array in arrays.items():
            if name in self.preferences.optional_inputs:  # `bind_cpu_input` does not know them
                binding.bind_ortvalue_input(name, import_onnxruntime().OrtValue.ortvalue_from_numpy(array))
            else:
                binding.bind_cpu_input(name, array)
        values = {} if cache is None else cache.values
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        in_place = self._in_place(cache)
        for tensor in self.graph.outputs:
            if tensor.name in in_place:
                binding.bind_ortvalue_output(tensor.name, values[in_place[tensor.name]])
            else:
                binding.bind_output(tensor.name, "cpu")
        return binding

    def _in_place(self, cache: NumpyKVCache | None) -> dict[str, str]:
        """Return the outputs of this call that share the buffer of an input: present_* → past_*."""
        contract = self.graph.cache
        if cache is None or contract is None or contract.update != "in_place":
            return {}
        return dict(zip(contract.written_names, contract.past_names, strict=True))


def _is_small(feeds: Mapping[str, Array]) -> bool:
    """Return whether a call of a language model has few tokens; the session reports ids that are missing or wrong."""
    shape: tuple[int, ...] = getattr(feeds.get("input_ids"), "shape", ())
    return len(shape) == 2 and math.prod(shape) <= (DECODE_ROWS if shape[1] == 1 else DECODE_TOKENS)


def session_options(threads: int | None) -> Any:
    """Return the options of every session. Raises EngineError if `threads` is out of range."""
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
        message = f"threads is {threads!r}, expected a whole number from 1 to {MAX_THREADS}"
        raise EngineError("options.out_of_range", message)
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads or limited_threads() or 0
    # Each session has its own threads; those of an earlier graph would keep spinning on the cores of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without a limit, the threads of a session that is being opened spin until it is open.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    options.inter_op_num_threads = 1
    # onnxruntime keeps one memory pattern for every set of input shapes, and shapes differ from call to call.
    options.enable_mem_pattern = False
    return options


def open_file(
    path: str | os.PathLike[str], graph: GraphSpec, options: Any, *, from_bytes: bool = False, **arguments: Any
) -> Any:
    """Open a file in onnxruntime, and compare its inputs and outputs with the manifest.

    `from_bytes` passes the file's bytes, because `options` set the folder of its external data.

    Raises:
        EngineError: onnxruntime rejects the file, or the file does not fit the manifest.
    """
    ort = import_onnxruntime()
    try:
        model = Path(path).read_bytes() if from_bytes else str(Path(path))
        with _attention_in_tiles(graph.variant == DECODE):
            session = ort.InferenceSession(model, sess_options=options, **arguments)
    except Exception as error:  # onnxruntime's exceptions share no base class
        message = f"{graph}: onnxruntime {ort.__version__} rejects {path}: {_one_line(error)}"
        raise EngineError("engine.rejected_graph", message) from error
    _check_contract(graph, session, str(path))
    return session


@contextmanager
def _attention_in_tiles(tiles: bool) -> Iterator[None]:
    """Let GroupQueryAttention score keys in tiles, or all at once, in a session that is opened inside the block.

    Tiles (flash attention) are faster for one token per row with head_dim 128, and slower for the chunks of a prefill.
    An environment variable is the only switch; if the user has set it, it is left unchanged.
    """
    with _environment:
        if tiles or _FLASH in os.environ:
            yield
            return
        os.environ[_FLASH] = "1"
        try:
            yield
        finally:
            del os.environ[_FLASH]


def failure(graph: GraphSpec, feeds: Mapping[str, Any], symbols: Mapping[str, int], error: Exception) -> str:
    """Return the message of a failed call of onnxruntime."""
    return f"{graph}: onnxruntime failed with {describe_call(feeds, symbols)}: {_one_line(error)}"


def _check_contract(graph: GraphSpec, session: Any, path: str) -> None:
    """Compare the file's inputs and outputs with the manifest; a dim may be dynamic in the file alone."""
    for kind, listed, nodes in (
        ("input", graph.inputs, session.get_inputs()),
        ("output", graph.outputs, session.get_outputs()),
    ):
        found = {node.name: node for node in nodes}
        if set(found) != {tensor.name for tensor in listed}:
            names = ", ".join(sorted(set(found) ^ {tensor.name for tensor in listed}))
            message = f"{graph}: the {kind}s of {path} are not those of the manifest; they differ in: {names}."
            raise EngineError("engine.rejected_graph", message)
        for tensor in listed:
            node = found[tensor.name]
            inner = node.type.removeprefix("tensor(").removesuffix(")")
            dtype = _DTYPES.get(inner, inner)
            # onnxruntime may not know an output's shape.
            unknown = kind == "output" and not node.shape
            if dtype != tensor.dtype or not (unknown or _fits(node.shape, tensor.dims)):
                found_as = f"{kind} {node.name!r} of {path} is {dtype} {node.shape}"
                raise EngineError("engine.rejected_graph", f"{graph}: {found_as}; the manifest says {tensor}.")


def _fits(shape: Sequence[int | str | None], dims: Sequence[int | str]) -> bool:
    if len(shape) != len(dims):
        return False
    return all(not isinstance(size, int) or size == dim for size, dim in zip(shape, dims, strict=True))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:499]}…"


def import_onnxruntime() -> Any:
    """Import onnxruntime. Raises EngineError if that fails."""
    try:
        import onnxruntime
    except ImportError as error:
        message = f"onnxruntime cannot be imported ({error}). Install it with: {install_command('cpu')}"
        raise EngineError("engine.not_installed", message) from error
    onnxruntime.disable_telemetry_events()  # if the program imported it before bridge_stg
    return onnxruntime
