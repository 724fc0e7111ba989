"""The three graphs as sessions of the runtime, computed by eager torch: the reference of every export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from bridge_stg.model.language_model import BufferCache, visible_keys
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.backends.session import KVCache, Preferences, check_feeds
from bridge_stg.runtime.bundle.contracts import GRAPHS, graph_contract
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.grounder import Grounder


class TorchCache:
    """KV buffers of a torch session."""

    def __init__(self, graph: GraphSpec, batch: int, capacity: int) -> None:
        assert graph.cache is not None
        shape = (batch, graph.cache.kv_heads, capacity, graph.cache.head_dim)
        self.names = graph.cache.past_names
        self.buffers = [torch.zeros(shape) for _ in self.names]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.buffers[0].shape[0]

    @property
    def capacity(self) -> int:
        """Positions a row."""
        return self.buffers[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.numel() * b.element_size() for b in self.buffers)

    def copy_prefix(self, source: KVCache, length: int, rows: Sequence[int] | None = None) -> None:
        """Copy the first `length` positions of `source` into `rows` (None: all); see `KVCache`."""
        if not isinstance(source, TorchCache):
            raise EngineError(
                "engine.bad_cache", f"a cache of {type(source).__name__} cannot be copied into a torch cache"
            )
        into = list(range(self.batch)) if rows is None else list(rows)
        for mine, theirs in zip(self.buffers, source.buffers):
            mine[into, :, :length] = theirs[:, :, :length]

    def read(self) -> dict[str, np.ndarray]:
        """Return a copy of the buffers by name."""
        return {name: buffer.numpy().copy() for name, buffer in zip(self.names, self.buffers)}

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite the buffers."""
        for name, buffer in zip(self.names, self.buffers):
            buffer.copy_(torch.from_numpy(values[name]))


class TorchSession:
    """One graph of a `BridgeSTG`, behind the runtime's session protocol.

    Args:
        name: `vision_encoder`, `language_model` or `spatial_decoder`.
        model: in eval mode.
    """

    preferences = Preferences()
    device = None

    def __init__(self, name: str, model: BridgeSTG) -> None:
        self.graph = graph_contract(name, model.spec, variant="eager", opset=0)
        self._model = model

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, np.ndarray]:
        """Run the graph; see `bridge_stg.runtime.backends.session.Session.infer`."""
        check_feeds(self.graph, feeds, cache)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
        with torch.no_grad():
            if self.graph.cache is not None:
                return self._infer_cached(tensors, cache)
            outputs = getattr(self._model, self.graph.name)(**tensors)
        return {t.name: output.float().numpy() for t, output in zip(self.graph.outputs, outputs)}

    def _infer_cached(self, tensors: dict[str, torch.Tensor], cache: KVCache | None) -> dict[str, np.ndarray]:
        assert self.graph.cache is not None
        names = self.graph.cache.past_names
        if cache is None:
            past = [tensors.pop(name) for name in names]
        else:
            if not isinstance(cache, TorchCache):
                raise EngineError("engine.bad_cache", f"{self.graph}: was given a cache of {type(cache).__name__}")
            past = cache.buffers
        position = tensors["cache_position"]
        buffers = BufferCache(past, position)
        mask = visible_keys(position, tensors["input_ids"].shape[1], past[0].shape[2])
        logits, taps = self._model.language_model(**tensors, mask=mask, cache=buffers)
        outputs = {"logits": logits.numpy(), "taps": taps.numpy()}
        if isinstance(cache, TorchCache):
            cache.buffers = buffers.present
            return outputs
        return outputs | {n: b.numpy() for n, b in zip(self.graph.cache.written_names, buffers.present)}

    def allocate_cache(self, *, batch: int, capacity: int) -> TorchCache:
        """Return zero-filled KV buffers."""
        if self.graph.cache is None:
            raise EngineError("engine.bad_cache", f"{self.graph}: this graph keeps no cache")
        return TorchCache(self.graph, batch, capacity)

    def close(self) -> None:
        """Nothing to free: the model owns its weights."""


def torch_grounder(model: BridgeSTG) -> Grounder:
    """Return the runtime's chain over a model's torch graphs: the reference that exports are compared with.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("BridgeSTG(config, tokenizer): a tokenizer is needed to ground a query")
    return Grounder({name: TorchSession(name, model) for name in GRAPHS}, model.spec, model.tokenizer)
