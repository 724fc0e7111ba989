"""The interface of every backend: a graph that takes and returns named arrays, and the KV cache that it updates.

Knows nothing of tokens, videos or a backend. Inputs are checked here, so that all backends reject the same mistakes
with the same message before an engine runs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bridge_stg.runtime.bundle.manifest import GraphSpec, TensorSpec
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.errors import EngineError

if TYPE_CHECKING:
    from bridge_stg.runtime.device.context import DeviceContext


class KVCache(Protocol):
    """The KV buffers of one batch, [batch, kv_heads, capacity, head_dim] each, in the backend's memory."""

    @property
    def batch(self) -> int:
        """Number of rows."""

    @property
    def capacity(self) -> int:
        """Positions per row."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""

    def copy_prefix(self, source: KVCache, length: int) -> None:
        """Copy the first `length` positions of `source`, which has as many rows, or one row that is copied to all.

        Raises EngineError: the sizes do not fit, or the cache is another backend's.
        """

    def read(self) -> dict[str, np.ndarray]:
        """Return a copy of the whole cache by the names of the graph's inputs (past_key_0 …)."""

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite the whole cache with values as `read` returns them. Raises EngineError if shape or dtype differ."""


PREFILL_CHUNK = 1024
"""Default of `Preferences.prefill_chunk`; bounds the memory of attention scores."""


@dataclass(frozen=True)
class Preferences:
    """The sizes and inputs with which a session runs best.

    Attributes:
        prefill_chunk: maximum new tokens per call while a video is prefilled.
        encoder_patches: maximum patches per call of a vision encoder.
        optional_inputs: inputs beyond the contract that a call may give, such as `contracts.TOKEN_GROUPS`.
    """

    prefill_chunk: int = PREFILL_CHUNK
    encoder_patches: int = sys.maxsize
    optional_inputs: frozenset[str] = frozenset()


class Session(Protocol):
    """One graph on one backend. Safe to call from several threads, each with its own cache.

    A backend that computes on a device returns the tensors that pass between graphs (visual tokens, feature maps, taps)
    as `DeviceArray`. Sessions of the same chain take them without a copy, `np.asarray` downloads them. All other
    tensors are numpy arrays.
    """

    @property
    def graph(self) -> GraphSpec:
        """The manifest's entry of the graph."""

    @property
    def preferences(self) -> Preferences:
        """Sizes and inputs to call this session with. May wait until the session is open."""

    @property
    def device(self) -> DeviceContext | None:
        """The device on which the session takes frames without a copy; None: the host. Never waits."""

    def infer(self, feeds: Mapping[str, Any], *, cache: KVCache | None = None) -> dict[str, Any]:
        """Run the graph.

        Args:
            feeds: every input by name, with the dtype and dims of `graph.inputs`; with `cache`, without the past_*
                inputs. A backend on a device also takes arrays that support DLPack on that device.
            cache: read and updated by this call: L new positions per row, from cache_position[row] on.

        Returns:
            Every output by name; with `cache`, all but those that belong to the cache.

        Raises:
            EngineError: an input is missing, unexpected or does not fit, or the backend failed.
        """

    def allocate_cache(self, *, batch: int, capacity: int) -> KVCache:
        """Return a zero-filled cache. Raises EngineError if the graph has none, or for lack of memory."""

    def close(self) -> None:
        """Free the backend's resources. Later calls of `infer` raise EngineError."""


class SessionWrapper:
    """A session that passes every call on to another one: the base of those that record, count or change calls.

    It has default preferences and no device, so that what a subclass records does not depend on the backend.
    """

    preferences = Preferences()
    device: DeviceContext | None = None

    def __init__(self, session: Session) -> None:
        self.session = session
        self.graph: GraphSpec = session.graph

    def infer(self, feeds: Mapping[str, Any], *, cache: KVCache | None = None) -> dict[str, Any]:
        """See `Session.infer`."""
        return self.session.infer(feeds, cache=cache)

    def allocate_cache(self, *, batch: int, capacity: int) -> KVCache:
        """See `Session.allocate_cache`."""
        return self.session.allocate_cache(batch=batch, capacity=capacity)

    def close(self) -> None:
        """See `Session.close`."""
        self.session.close()


def largest(session: Session, symbol: str) -> int:
    """Return the largest size of a symbol that a session takes; `sys.maxsize` if it has no limit."""
    most = session.graph.ranges.get(symbol, (0, None))[1]
    return sys.maxsize if most is None else most


def smallest(session: Session, symbol: str) -> int:
    """Return the smallest size of a symbol that a session takes."""
    return session.graph.ranges.get(symbol, (1, None))[0]


def check_finite(graph: str, **outputs: Any) -> None:
    """Check outputs of a graph for NaN and infinity, where they lie on the host; on a device it shows later.

    Raises:
        EngineError: an output is not finite; the message names graph and output.
    """
    for name, array in outputs.items():
        if isinstance(array, np.ndarray) and not np.isfinite(array).all():
            advice = "choose another variant, and compare it with the bundle's golden cases"
            raise EngineError("engine.not_finite", f"{graph} returned {name} with values that are not finite; {advice}")


def describe_call(feeds: Mapping[str, Any], symbols: Mapping[str, int]) -> str:
    """Return the shapes and symbols of a call, for error messages."""
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
    return f"{shapes} ({', '.join(f'{symbol} = {size}' for symbol, size in symbols.items())})"


def check_feeds(graph: GraphSpec, feeds: Mapping[str, Any], cache: KVCache | None = None) -> dict[str, int]:
    """Check inputs against the manifest: names, dtypes, ranks, dims, one value per symbol, room in the cache.

    Args:
        graph: the manifest's entry.
        feeds: arrays by name.
        cache: the call's KV cache, which takes the place of the past_* inputs.

    Returns:
        The value of every symbol of the inputs, such as {"B": 1, "L": 7, "S": 256}.

    Raises:
        EngineError: the message names the tensor, what was found and what was expected.
    """
    if cache is not None and graph.cache is None:
        raise EngineError("engine.bad_cache", f"{graph}: got a KV cache, but this graph has none.")
    by_cache = set(graph.cache.past_names) if graph.cache is not None and cache is not None else set()
    expected = {tensor.name: tensor for tensor in graph.inputs if tensor.name not in by_cache}
    _check_names(graph, feeds, expected, by_cache)
    bound: dict[str, tuple[int, str]] = {}
    if cache is not None and graph.cache is not None:
        past = next(tensor for tensor in graph.inputs if tensor.name == graph.cache.past_names[0])
        shape = (cache.batch, graph.cache.kv_heads, cache.capacity, graph.cache.head_dim)
        _bind(graph, past, shape, "the cache", bound)
    for name, tensor in expected.items():
        _check_tensor(graph, tensor, feeds[name])
        _bind(graph, tensor, feeds[name].shape, f"input {name!r}", bound)
    symbols = {symbol: size for symbol, (size, _) in bound.items()}
    if graph.cache is not None:
        _check_room(graph, feeds, symbols)
    return symbols


def _bad_input(graph: GraphSpec, text: str) -> EngineError:
    return EngineError("engine.bad_input", f"{graph}: {text}")


def _check_names(
    graph: GraphSpec, feeds: Mapping[str, Any], expected: Mapping[str, TensorSpec], by_cache: set[str]
) -> None:
    for name, tensor in expected.items():
        if name not in feeds:
            raise _bad_input(graph, f"input {name!r} is missing; expected {tensor}.")
    for name in feeds:
        if name in by_cache:
            raise _bad_input(graph, f"input {name!r} was given, but comes from the cache in this call.")
        if name not in expected:
            raise _bad_input(graph, f"has no input {name!r}; its inputs: {', '.join(expected)}.")


def _check_tensor(graph: GraphSpec, tensor: TensorSpec, array: Any) -> None:
    if not isinstance(array, (np.ndarray, DeviceArray)):
        raise _bad_input(graph, f"input {tensor.name!r} is a {type(array).__name__}, expected a numpy array {tensor}.")
    if str(array.dtype) != tensor.dtype:
        raise _bad_input(graph, f"input {tensor.name!r} is {array.dtype}, expected {tensor}.")
    if array.ndim != len(tensor.dims):
        raise _bad_input(graph, f"input {tensor.name!r} has shape {list(array.shape)}, expected {tensor}.")


def _bind(
    graph: GraphSpec, tensor: TensorSpec, shape: tuple[int, ...], source: str, bound: dict[str, tuple[int, str]]
) -> None:
    """Set each symbol of a tensor to its size, and check it against earlier sources and the graph's ranges."""
    for dim, size in zip(tensor.dims, shape, strict=True):
        found = f"input {tensor.name!r} has shape {list(shape)}"
        if isinstance(dim, int):
            if size != dim:
                raise _bad_input(graph, f"{found}, expected {tensor}.")
            continue
        value, origin = bound.setdefault(dim, (size, source))
        if value != size:
            raise _bad_input(graph, f"{found}, so {dim} = {size}, but {dim} = {value} in {origin}; expected {tensor}.")
        least, most = graph.ranges.get(dim, (0, None))
        if size < least or (most is not None and size > most):
            limits = f"{least} to {most}" if most is not None else f"at least {least}"
            message = f"{graph}: input {tensor.name!r} has {dim} = {size}; this graph takes {limits}."
            raise EngineError("engine.out_of_range", message)


def _check_room(graph: GraphSpec, feeds: Mapping[str, Any], symbols: Mapping[str, int]) -> None:
    """Check S ≥ cache_position + L in every row: some backends write past the end of a buffer otherwise."""
    if "L" not in symbols or "S" not in symbols:
        return
    positions, new, capacity = np.asarray(feeds["cache_position"]), symbols["L"], symbols["S"]
    bad = np.flatnonzero((positions < 0) | (positions + new > capacity))
    if bad.size:
        row = int(bad[0])
        found = f"cache_position of row {row} is {int(positions[row])}"
        message = f"{graph}: {found}; with {new} new positions, it exceeds the cache's {capacity} positions."
        raise EngineError("engine.out_of_range", message)
