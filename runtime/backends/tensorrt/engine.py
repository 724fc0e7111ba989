"""A TensorRT engine: its tensors, checked against the manifest, its profiles and its execution contexts.

Knows nothing of caches and feeds: a call is a profile, a shape for every input and an address for every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from bridge_stg.runtime.backends.tensorrt.library import TensorRT
from bridge_stg.runtime.bundle.manifest import GraphSpec, TensorSpec
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.memory import ALIGNMENT, Block
from bridge_stg.runtime.errors import EngineError

Shapes = Mapping[str, tuple[int, ...]]
Span = tuple[int, int]


class TensorRTEngine:
    """A deserialized engine on the device of its chain.

    Args:
        library: the TensorRT package.
        device: the chain's device.
        plan: the serialized engine, or its file, which is read without a second copy in memory.
        graph: the manifest entry that it was built from.
        cuda_graphs: whether TensorRT-RTX may capture CUDA graphs itself.
        kernels: the result of `kernel_cache` in an earlier process (TensorRT-RTX).

    Raises:
        EngineError: TensorRT rejects the plan, or its tensors are not those of the manifest.

    Attributes:
        profiles: minimum and maximum size of every symbol, for each optimization profile.
    """

    def __init__(
        self,
        library: TensorRT,
        device: DeviceContext,
        plan: bytes | Path,
        graph: GraphSpec,
        *,
        cuda_graphs: bool = False,
        kernels: bytes | None = None,
    ) -> None:
        self.bindings, self.device, self.graph = library, device, graph
        self._cuda_graphs = cuda_graphs
        self._engine: Any = library.load_engine(plan)
        if self._engine is None:
            raise EngineError(
                "engine.rejected_engine",
                f"{graph}: TensorRT {library.version} on {device.device.name} cannot load this engine: "
                f"{library.reason()}. Build it on this machine: python cli.py build BUNDLE --target this",
            )
        self._kernels = self._load_kernels(kernels)
        self._check_tensors()
        self.profiles = [self._spans(index) for index in range(self._engine.num_optimization_profiles)]
        self._contexts: dict[int, _Context] = {}
        self._scratch_bytes = [library.scratch_bytes(self._engine, i) for i in range(len(self.profiles))]
        device.reserve_scratch(max(self._scratch_bytes, default=0))

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The minimum and maximum size of every symbol, over all profiles."""
        symbols = {symbol for spans in self.profiles for symbol in spans}
        return {
            symbol: (min(p[symbol][0] for p in self.profiles), max(p[symbol][1] for p in self.profiles))
            for symbol in symbols
        }

    def aliases(self) -> dict[str, str] | None:
        """Return the outputs that the engine writes over an input: output → input; None before TensorRT 10.15."""
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return None
        pairs = {t.name: self._engine.get_aliased_input_tensor(t.name) for t in self.graph.outputs}
        return {output: source for output, source in pairs.items() if source}

    def profile_for(self, sizes: Mapping[str, int]) -> int:
        """Return the narrowest profile that contains these sizes.

        Raises:
            EngineError: no profile does; the message lists all.
        """
        if fitting := self._fitting(sizes):
            return min(fitting, key=lambda index: sum(most for _, most in self.profiles[index].values()))
        requested = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
        known = "; ".join(
            ", ".join(f"{symbol} {least}–{most}" for symbol, (least, most) in spans.items()) for spans in self.profiles
        )
        raise EngineError(
            "engine.out_of_range",
            f"{self.graph}: no profile of this engine takes {requested}; it has: {known}. Build it again with other "
            "--profiles, or use a smaller video, query or batch",
        )

    def largest_part(self, symbol: str, sizes: Mapping[str, int]) -> int | None:
        """Return how much of a symbol's size one call takes if the others stay; None: no profile takes these."""
        others = {name: size for name, size in sizes.items() if name != symbol}
        sizes_taken = [min(self.profiles[index][symbol][1], sizes[symbol]) for index in self._fitting(others)]
        return max(sizes_taken, default=None)

    def _fitting(self, sizes: Mapping[str, int]) -> list[int]:
        return [
            index
            for index, spans in enumerate(self.profiles)
            if all(spans[s][0] <= size <= spans[s][1] for s, size in sizes.items() if s in spans)
        ]

    def new_context(self, profile: int) -> _Context:
        """Return a new context for a profile; each CUDA graph needs its own."""
        context = self.bindings.context(self._engine, cuda_graphs=self._cuda_graphs, kernels=self._kernels)
        if context is None:
            message = f"{self.graph}: TensorRT has no memory for another context: {self.bindings.reason()}"
            raise EngineError("engine.out_of_memory", message)
        return _Context(self, context, profile)

    def context(self, profile: int) -> _Context:
        """Return the context that calls of a profile share."""
        if profile not in self._contexts:
            self._contexts[profile] = self.new_context(profile)
        return self._contexts[profile]

    def scratch(self, profile: int) -> Block:
        """Return the activation memory, which all contexts of the chain use in turn."""
        return self.device.reserve_scratch(self._scratch_bytes[profile])

    def kernel_cache(self) -> bytes | None:
        """Return the kernels that TensorRT-RTX compiled on this device, for the next process; None without any."""
        if self._kernels is None:
            return None
        return None if (blob := self._kernels.serialize()) is None else bytes(blob)

    def close(self) -> None:
        """Release the engine. Its work must be done."""
        self._contexts.clear()
        self._kernels = None
        self._engine = None

    def _load_kernels(self, blob: bytes | None) -> Any:
        if not self.bindings.is_rtx:
            return None
        cache = self._engine.create_runtime_config().create_runtime_cache()
        if blob is not None and not cache.deserialize(blob):
            self.bindings.reason()  # of another driver or version: compiled again
        return cache

    def _check_tensors(self) -> None:
        engine, module = self._engine, self.bindings.module
        expected = {t.name: (t, module.TensorIOMode.INPUT) for t in self.graph.inputs}
        expected |= {t.name: (t, module.TensorIOMode.OUTPUT) for t in self.graph.outputs}
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if differ := ", ".join(sorted(names ^ set(expected))):
            message = f"{self.graph}: the engine's tensors differ from the manifest's: {differ}"
            raise EngineError("engine.rejected_engine", message)
        for name, (tensor, mode) in expected.items():
            shape, dtype = tuple(engine.get_tensor_shape(name)), self.bindings.dtype(engine.get_tensor_dtype(name))
            fits = len(shape) == len(tensor.dims) and all(
                found in (-1, dim) or not isinstance(dim, int) for found, dim in zip(shape, tensor.dims, strict=False)
            )
            if engine.get_tensor_location(name) != module.TensorLocation.DEVICE:
                message = f"{self.graph}: the engine expects {name!r} on the host, and the chain has it on the device"
                raise EngineError("engine.rejected_engine", message)
            if engine.get_tensor_mode(name) != mode or dtype != tensor.dtype or not fits:
                message = f"{self.graph}: {name!r} of the engine is {dtype} {list(shape)}; the manifest says {tensor}"
                raise EngineError("engine.rejected_engine", message)

    def _spans(self, profile: int) -> dict[str, Span]:
        """Return the minimum and maximum size of every symbol in one profile."""
        spans: dict[str, Span] = {}
        for tensor in self.graph.inputs:
            least, _, most = (tuple(dims) for dims in self._engine.get_tensor_profile_shape(tensor.name, profile))
            for symbol, low, high in zip(tensor.dims, least, most, strict=True):
                if isinstance(symbol, str):
                    before = spans.get(symbol, (low, high))
                    spans[symbol] = (max(low, before[0]), min(high, before[1]))
        return spans


class _Context:
    """An execution context. To be used under the chain's lock, since all contexts share their scratch memory."""

    def __init__(self, engine: TensorRTEngine, context: Any, profile: int) -> None:
        self._engine, self._context, self._profile = engine, context, profile
        self.scratch: Block | None = None  # what the last `bind` used
        device = engine.device
        if not context.set_optimization_profile_async(profile, device.stream):
            self._fail(f"cannot use profile {profile}")
        # The copies of this switch must be done before the context runs, or is captured, on any stream.
        device.cuda("cudaStreamSynchronize", device.stream)

    def output_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Set the shapes of the inputs and return those of the outputs.

        Raises:
            EngineError: a shape is rejected, or an output's depends on values.
        """
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, tuple(shape)):
                self._fail(f"rejects the shape {list(shape)} of {name!r}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:  # what the bindings raise for anything but a missing shape
            self._fail(f"cannot infer the shapes of the outputs ({error})")
        if missing:
            self._fail(f"misses the shapes of {', '.join(missing)}")
        found = {t.name: tuple(self._context.get_tensor_shape(t.name)) for t in self._engine.graph.outputs}
        for name, shape in found.items():
            if any(size < 0 for size in shape):
                self._fail(f"does not know the shape of {name!r} ({list(shape)})")
        return found

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Set the address of every tensor, and the scratch memory if it has moved."""
        for name, address in addresses.items():
            if address % ALIGNMENT:
                message = f"{self._engine.graph}: the address {address:#x} of {name!r} is not a multiple of {ALIGNMENT}"
                raise EngineError("engine.failed", message)
            if not self._context.set_tensor_address(name, address):
                self._fail(f"rejects the address of {name!r}")
        scratch = self._engine.scratch(self._profile)
        if scratch is not self.scratch:
            self._engine.bindings.set_scratch(self._context, scratch.address, scratch.size)
            self.scratch = scratch

    def execute(self, stream: int) -> None:
        """Put the engine's work on a stream."""
        if not self._context.execute_async_v3(stream):
            self._fail("failed")

    def capturable(self, stream: int) -> bool:
        """Return whether the work can be captured as a CUDA graph, as far as this TensorRT knows."""
        check = getattr(self._context, "is_stream_capturable", None)
        return True if check is None else bool(check(stream))

    def _fail(self, what: str) -> NoReturn:
        raise EngineError("engine.failed", f"{self._engine.graph}: TensorRT {what}: {self._engine.bindings.reason()}")


def tensor_shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return an input's shape for sizes of the symbols."""
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims)
