"""Runtime sessions that run the graphs in eager torch: the reference of every export."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from bridge_stg.model.language_model import BufferCache, visible_keys
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.backends.kv_cache import BufferedCache, cache_spec, own_cache
from bridge_stg.runtime.backends.session import KVCache, Preferences, check_feeds
from bridge_stg.runtime.bundle.contracts import graph_contract, graphs_of
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.text import TextOptions


class TorchCache(BufferedCache[np.ndarray]):
    """KV cache of a torch session, in numpy memory."""


class TorchSession:
    """One graph of a `BridgeSTG` in eval mode as a session of the runtime."""

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
        contract, kv = cache_spec(self.graph), own_cache(self.graph, cache, TorchCache)
        if kv is None:
            past = [tensors.pop(name) for name in contract.past_names]
        else:
            past = [torch.from_numpy(buffer) for buffer in kv.buffers.values()]
        position = tensors["cache_position"]
        buffers = BufferCache(past, position)
        mask = visible_keys(position, tensors["input_ids"].shape[1], past[0].shape[2])
        results = self._model.language_model(**tensors, mask=mask, cache=buffers)
        present = [buffer.numpy() for buffer in buffers.present]
        outputs = {name: output.numpy() for name, output in zip(("logits", "taps"), results)}
        if kv is None:
            return outputs | dict(zip(contract.written_names, present))
        kv.buffers = dict(zip(contract.past_names, present))
        return outputs

    def allocate_cache(self, *, batch: int, capacity: int) -> TorchCache:
        """See `Session.allocate_cache`."""
        return TorchCache(cache_spec(self.graph), batch=batch, capacity=capacity, zeros=np.zeros)

    def close(self) -> None:
        """Do nothing: the model owns its weights."""


def torch_grounder(model: BridgeSTG, *, heads: str | None = None, text: TextOptions | None = None) -> Grounder:
    """Return a `Grounder` that runs a model's graphs in eager torch; raise ValueError without a tokenizer.

    `heads` and `text` are as for `Grounder.load`.
    """
    if model.tokenizer is None:
        raise ValueError("BridgeSTG(config, tokenizer): a tokenizer is needed to ground a query")
    sessions = {name: TorchSession(name, model) for name in graphs_of(model.spec)}
    return Grounder(sessions, model.spec, model.tokenizer, heads=heads, text=text)
