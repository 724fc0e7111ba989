"""Fake of TensorRT's Python interface that computes graphs with onnxruntime on the fake CUDA.

It has the names of the bindings (tensorrt_rtx_bindings 1.7.1) and enforces the rules of TensorRT's documentation: every
tensor has an address, aligned to 256 bytes and inside one allocation; shapes are within the active profile; uint8
inputs are only cast; an output that the engine writes in place has its input's address and is written inside its rows,
and no other tensors overlap; scratch memory of the profile's size is set if the context was created without it; work is
captured only after it ran once with these shapes, and the context does not change afterwards. Breaking a rule raises
AssertionError.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bridge_stg.runtime.bundle.manifest import GraphSpec
from tests.fakes.cuda import FakeCuda

Profiles = Sequence[Mapping[str, tuple[int, int, int]]]
ALIGNMENT = 256


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, INT64 = range(7)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


NAMES = {
    "float32": DataType.FLOAT, "float16": DataType.HALF, "int8": DataType.INT8, "int32": DataType.INT32,
    "bool": DataType.BOOL, "uint8": DataType.UINT8, "int64": DataType.INT64,
}  # fmt: skip


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.made = True


def make_plan(
    path: Path,
    graph: GraphSpec,
    profiles: Profiles,
    *,
    capacity: int | None = None,
    sizes: Mapping[str, str] | None = None,
    aliased: int | None = None,
) -> bytes:
    """Return a fake serialized engine.

    Args:
        path: path of the .onnx file.
        graph: specification of the graph.
        profiles: symbol → (min, opt, max) per profile.
        capacity: S of a cache that is updated in place.
        sizes: output symbols as expressions of input symbols ({"h": "height // 16"}).
        aliased: number of cache outputs that are written in place; None: all.
    """
    check_types(path)
    in_place = graph.cache is not None and graph.cache.update == "in_place"
    ranges = [{s: (p[s][0], p[s][2]) for s in p} for p in profiles]
    if in_place:
        ranges = [{**spans, "S": (capacity, capacity)} for spans in ranges]
    tensors = {
        tensor.name: {"dims": tensor.dims, "dtype": tensor.dtype, "input": tensor in graph.inputs}
        for tensor in (*graph.inputs, *graph.outputs)
    }
    pairs = list(zip(graph.cache.written_names, graph.cache.past_names, strict=True)) if in_place else []
    about = {
        "path": str(path), "tensors": tensors, "ranges": ranges, "fixed": {"S": capacity} if in_place else {},
        "aliases": dict(pairs[:aliased]), "sizes": dict(sizes or {}),
    }  # fmt: skip
    return b"plan" + json.dumps(about).encode()


class SeekPosition(enum.Enum):
    SET, CUR, END = range(3)


class IStreamReaderV2:
    """Base class of readers; `whole` reads as TensorRT does: some bytes, back to the start, all until none are left."""

    def __init__(self) -> None:
        self.made = True

    def whole(self) -> bytes:
        assert self.made
        assert len(self.read(4, 0)) == 4 and self.seek(0, SeekPosition.SET)
        parts = []
        while part := self.read(100, 0):
            assert len(part) <= 100
            parts.append(part)
        return b"".join(parts)


def check_types(path: Path) -> None:
    """Raise AssertionError if a uint8 input is read by anything but Cast, as TensorRT's builder does."""
    graph = onnx.load(path, load_external_data=False).graph
    pixels = {value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    wrong = {(node.op_type, name) for node in graph.node for name in node.input if name in pixels} - {
        ("Cast", name) for name in pixels
    }
    assert not wrong, f"{path}: uint8 inputs are read by {sorted(wrong)}, and TensorRT only casts them"


class FakeTensorRT:
    """Fake module `tensorrt` or, with its runtime config, `tensorrt_rtx`."""

    TensorIOMode, TensorLocation, DataType, ILogger = TensorIOMode, TensorLocation, DataType, ILogger
    ExecutionContextAllocationStrategy, CudaGraphStrategy = ExecutionContextAllocationStrategy, CudaGraphStrategy
    IStreamReaderV2, SeekPosition = IStreamReaderV2, SeekPosition

    def __init__(self, cuda: FakeCuda, version: str = "10.15.1") -> None:
        self.cuda, self.__version__ = cuda, version
        self.engines: list[Engine] = []
        self.most_contexts: int | None = None  # of one engine; TensorRT returns None if it has no memory for another

    def Runtime(self, logger: ILogger) -> Runtime:
        assert logger.made
        return Runtime(self, logger)


class Runtime:
    def __init__(self, module: FakeTensorRT, logger: Any) -> None:
        self.module, self.logger = module, logger

    def deserialize_cuda_engine(self, plan: bytes | IStreamReaderV2) -> Engine | None:
        if isinstance(plan, IStreamReaderV2):
            plan = plan.whole()
        if not plan.startswith(b"plan"):
            self.logger.log(ILogger.ERROR, "Serialization assertion header.magicTag == kEXPECTED failed.")
            return None
        self.module.engines.append(Engine(self.module, self.logger, json.loads(plan[4:])))
        return self.module.engines[-1]


class Config:
    """Fake of TensorRT-RTX's runtime config."""

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: KernelCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> KernelCache:
        return KernelCache()

    def set_runtime_cache(self, cache: KernelCache) -> bool:
        self.cache = cache
        return True


class KernelCache:
    def __init__(self) -> None:
        self.blob = b""

    def deserialize(self, blob: bytes) -> bool:
        self.blob = blob
        return blob.startswith(b"kernels")

    def serialize(self) -> bytes:
        return self.blob or b"kernels of this process"


class Engine:
    def __init__(self, module: FakeTensorRT, logger: Any, about: dict[str, Any]) -> None:
        self.module, self.logger, self.about = module, logger, about
        self.tensors: dict[str, dict[str, Any]] = about["tensors"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.session = onnxruntime.InferenceSession(about["path"], options, providers=["CPUExecutionProvider"])
        self.contexts: list[Context] = []
        self.tried: dict[Any, tuple[int, ...]] = {}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(about["ranges"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self.tensors[name]["input"] else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return NAMES[self.tensors[name]["dtype"]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        fixed = self.about["fixed"]
        return tuple(d if isinstance(d, int) else fixed.get(d, -1) for d in self.tensors[name]["dims"])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert self.tensors[name]["input"]
        spans = self.about["ranges"][profile]
        least, most = (
            tuple(d if isinstance(d, int) else spans[d][side] for d in self.tensors[name]["dims"]) for side in (0, 1)
        )
        return [least, most, most]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        tensors = [t["dims"] for t in self.tensors.values()]
        spans = {**self.about["ranges"][profile], **{s: (n, n) for s, n in self.about["fixed"].items()}}
        sizes = (math.prod(d if isinstance(d, int) else spans.get(d, (1, 1))[1] for d in dims) for dims in tensors)
        return -(-sum(sizes) // ALIGNMENT) * ALIGNMENT

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.about["aliases"].get(name)

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, how: Any) -> Context | None:
        if len(self.contexts) == self.module.most_contexts:
            self.logger.log(ILogger.ERROR, "createExecutionContext: out of memory")
            return None
        strategy = how.strategy if isinstance(how, Config) else how
        self.contexts.append(Context(self, strategy, how if isinstance(how, Config) else None))
        return self.contexts[-1]


class Context:
    def __init__(self, engine: Engine, strategy: ExecutionContextAllocationStrategy, config: Config | None) -> None:
        self.engine, self.cuda, self.config = engine, engine.module.cuda, config
        self.own_scratch = strategy != ExecutionContextAllocationStrategy.USER_MANAGED
        self.scratch: tuple[int, int] | None = None
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran_with: tuple[Any, ...] | None = None
        self.captured = self.changed_after_capture = False
        self.rejects_capture = False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self.cuda.streams
        assert 0 <= profile < self.engine.num_optimization_profiles
        self.profile, self.shapes = profile, {}
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert not self.own_scratch
        assert address % 256 == 0 and size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        self.cuda.view(address, size)
        self.scratch = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        if not fits:
            self.engine.logger.log(ILogger.ERROR, f"setInputShape: {name} {shape} is outside of {least} to {most}")
            return False
        self.changed_after_capture |= self.captured and self.shapes.get(name) != tuple(shape)
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            for dim, size in zip(self.engine.tensors[name]["dims"], shape, strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise RuntimeError(f"{name}: dimension {dim} is {size}, and {sizes[dim]} elsewhere")
        return [n for n, t in self.engine.tensors.items() if t["input"] and n not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        sizes: dict[str, Any] = dict(self.engine.about["fixed"])
        for tensor, shape in self.shapes.items():
            for dim, size in zip(self.engine.tensors[tensor]["dims"], shape, strict=True):
                if isinstance(dim, str):
                    assert sizes.setdefault(dim, size) == size, f"{tensor} has {dim} = {size}, others {sizes[dim]}"
        for symbol, expression in self.engine.about["sizes"].items():
            sizes[symbol] = eval(expression, {}, sizes)
        dims = self.engine.tensors[name]["dims"]
        if any(isinstance(d, str) and d.isidentifier() and d not in sizes for d in dims):
            return self._tried_shape(name)
        return tuple(d if isinstance(d, int) else int(eval(d, {}, sizes)) for d in dims)

    def _tried_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an output with symbols that the inputs lack; TensorRT derives it from the layers."""
        key = (name, tuple(sorted(self.shapes.items())))
        if key not in self.engine.tried:
            tensors = self.engine.tensors
            zeros = {n: np.zeros(shape, tensors[n]["dtype"]) for n, shape in self.shapes.items()}
            outputs = [n for n, t in tensors.items() if not t["input"]]
            for output, value in zip(outputs, self.engine.session.run(outputs, zeros), strict=True):
                self.engine.tried[output, key[1]] = value.shape
        return self.engine.tried[key]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.tensors and address % 256 == 0 and address
        self.changed_after_capture |= self.captured and self.addresses.get(name) != address
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return not self.rejects_capture

    def execute_async_v3(self, stream: int) -> bool:
        assert stream in self.cuda.streams, "TensorRT runs on a stream of its own, not on the default stream"
        spans: dict[str, tuple[int, int]] = {}
        for name in self.engine.tensors:
            shape = self.get_tensor_shape(name)
            assert name in self.addresses, f"{name} has no address"
            size = math.prod(shape) * np.dtype(self.engine.tensors[name]["dtype"]).itemsize
            self.cuda.view(self.addresses[name], size)
            spans[name] = (self.addresses[name], self.addresses[name] + size)
        aliases = self.engine.about["aliases"]
        for output, source in aliases.items():
            assert self.addresses[output] == self.addresses[source], f"{output} must have the address of {source}"
        for output in (n for n, t in self.engine.tensors.items() if not t["input"]):
            for other, (start, stop) in spans.items():
                disjoint = stop <= spans[output][0] or spans[output][1] <= start
                assert disjoint or other in (output, aliases.get(output)), f"{output} overlaps {other}"
        scratch = self.scratch
        assert self.own_scratch or scratch is not None, "the context has no scratch memory"
        if scratch is not None:
            assert all(stop <= scratch[0] or scratch[0] + scratch[1] <= start for start, stop in spans.values())
            self.cuda.view(*scratch)
        state = (tuple(self.shapes.items()), self.profile)
        if self.cuda.streams[stream].captured is not None:
            assert self.ran_with == state, "captured before it ran once with these shapes"
            self.captured = True
        self.ran_with = state
        self.cuda.enqueue(stream, self._work(dict(self.addresses), dict(self.shapes), scratch))
        return True

    def _work(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], scratch: Any) -> Any:
        tensors = self.engine.tensors
        found = {name: self.get_tensor_shape(name) for name in tensors}

        def at(name: str) -> np.ndarray:
            dtype = np.dtype(tensors[name]["dtype"])
            flat = self.cuda.view(addresses[name], math.prod(found[name]) * dtype.itemsize)
            return flat.view(dtype).reshape(found[name])

        def work() -> None:
            assert not self.changed_after_capture, "the context of a captured graph was changed"
            outputs = [name for name, tensor in tensors.items() if not tensor["input"]]
            for written, source in self.engine.about["aliases"].items():
                last = at("cache_position").astype(np.int64) + found["input_ids"][1]
                assert (at("cache_position") >= 0).all() and (last <= found[source][2]).all(), f"{written} out of range"
            results = self.engine.session.run(outputs, {name: at(name).copy() for name in shapes})
            if scratch is not None:
                self.cuda.view(*scratch)[:] = 0xFF
            for name, result in zip(outputs, results, strict=True):
                assert result.shape == found[name], f"{name}: {result.shape}, not {found[name]}"
                at(name)[...] = result

        return work
