"""The TensorRT packages: import, differences between them, and their log messages.

TensorRT (10 and 11) and TensorRT-RTX have the same Python interface for running an engine. They differ in the names of
their packages and in how an execution context is set to share memory and to use CUDA graphs.
"""

from __future__ import annotations

import importlib
import threading
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.packages import install_command

MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""Import names of each family, best first."""

READ_BYTES = 2**26
"""Bytes of a plan that are read at once."""

DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""Numpy dtype by TensorRT's name, for the dtypes of a graph's contract."""


class TensorRT:
    """One TensorRT package and its last log messages.

    Args:
        family: a key of `MODULES`.
        module: the package; None: import it.

    Raises:
        EngineError: the package cannot be imported.
    """

    def __init__(self, family: str, module: Any = None) -> None:
        self.family = family
        self.module: Any = module if module is not None else _import(family)
        self.version = str(self.module.__version__)
        self.messages: deque[str] = deque(maxlen=4)
        self.logger = self._logger()
        self.runtime = self.module.Runtime(self.logger)

    @property
    def is_rtx(self) -> bool:
        """Whether kernels are compiled when an engine first runs, and the library captures CUDA graphs itself."""
        return self.family == "tensorrt_rtx"

    def reason(self) -> str:
        """Return the messages logged since the last call, in one line, and clear them."""
        text = "; ".join(" ".join(message.split()) for message in self.messages) or "no reason was logged"
        self.messages.clear()
        return text if len(text) <= 600 else f"{text[:599]}…"

    def load_engine(self, plan: bytes | Path) -> Any:
        """Return the engine of a plan in memory or, piece by piece, in a file; None if TensorRT rejects it."""
        if isinstance(plan, bytes):
            return self.runtime.deserialize_cuda_engine(plan)
        with open(plan, "rb", buffering=0) as file:
            reader = _plan_reader(self.module, file)
            return self.runtime.deserialize_cuda_engine(file.read() if reader is None else reader)

    def dtype(self, value: Any) -> str:
        """Return numpy's name of a TensorRT dtype."""
        name = getattr(value, "name", str(value))
        return DTYPES.get(name, name.lower())

    def scratch_bytes(self, engine: Any, profile: int) -> int:
        """Return the bytes that a context of a profile needs for activations."""
        for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
            if hasattr(engine, name):
                return int(getattr(engine, name)(profile))
        return int(engine.device_memory_size)

    def context(self, engine: Any, *, cuda_graphs: bool, kernels: Any = None) -> Any:
        """Return an execution context that uses the scratch memory of `set_scratch`.

        `cuda_graphs` (the context may capture them itself) and `kernels` (its runtime cache) are for TensorRT-RTX.
        """
        shared = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.is_rtx:
            return engine.create_execution_context(shared)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(shared)
        if cuda_graphs:
            config.cuda_graph_strategy = self.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if kernels is not None:
            config.set_runtime_cache(kernels)
        return engine.create_execution_context(config)

    def set_scratch(self, context: Any, address: int, size: int) -> None:
        """Set the scratch memory of a context."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, size)
        else:  # before TensorRT 10.1
            context.device_memory = address

    def _logger(self) -> Any:
        module, messages, lock = self.module, self.messages, threading.Lock()

        class Logger(module.ILogger):  # type: ignore[name-defined, misc]
            """Keep error messages for the exception of a failed call, instead of printing them."""

            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                    with lock:
                        messages.append(message)

        return Logger()


def _plan_reader(module: Any, file: BinaryIO) -> Any:
    """Return a reader of a plan for `deserialize_cuda_engine`; None if this TensorRT has none (before 10.0)."""
    if hasattr(module, "IStreamReaderV2"):
        origins = {module.SeekPosition.SET: 0, module.SeekPosition.CUR: 1, module.SeekPosition.END: 2}

        class SeekingReader(module.IStreamReaderV2):  # type: ignore[misc]
            """Reads at most `READ_BYTES` at once; TensorRT asks again for the rest."""

            def __init__(self) -> None:
                module.IStreamReaderV2.__init__(self)

            def read(self, num_bytes: int, stream: int) -> bytes:
                return file.read(min(num_bytes, READ_BYTES))

            def seek(self, offset: int, where: Any) -> bool:
                file.seek(offset, origins[where])
                return True

        return SeekingReader()
    if not hasattr(module, "IStreamReader"):
        return None

    class Reader(module.IStreamReader):  # type: ignore[misc]
        """Reads what TensorRT asks for: before 10.7, it does not ask again for the rest."""

        def __init__(self) -> None:
            module.IStreamReader.__init__(self)

        def read(self, size: int) -> bytes:
            parts = []
            while size > 0 and (part := file.read(size)):
                parts.append(part)
                size -= len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    return Reader()


def _import(family: str) -> Any:
    failures = []
    for name in MODULES[family]:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            failures.append(f"{name}: {error}")
    extra, source = ("rtx", "") if family == "tensorrt_rtx" else ("tensorrt", ", or use the one of JetPack")
    raise EngineError(
        "engine.not_installed",
        f"no package of {family} can be imported ({'; '.join(failures)}). Install it: {install_command(extra)}{source}",
    )
