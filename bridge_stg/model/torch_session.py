"""Runtime sessions that run the graphs in eager torch: the reference of every export."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from bridge_stg.model.language_model import BufferCache, visible_keys
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.backends.kv_cache import BufferedCache, cache_spec, own_cache
from bridge_stg.runtime.backends.session import KVCache, Preferences, check_feeds
from bridge_stg.runtime.bundle.contracts import graph_contract, graphs_of
from bridge_stg.runtime.bundle.manifest import CacheSpec
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions


class TorchCache(BufferedCache[Any]):
    """KV cache of a torch session: tensors on the model's device."""

    def __init__(self, spec: CacheSpec, *, batch: int, capacity: int, device: torch.device) -> None:
        def zeros(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            try:
                return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
            except RuntimeError as error:  # torch has no error of its own for the host's memory
                raise MemoryError(str(error)) from error

        super().__init__(spec, batch=batch, capacity=capacity, zeros=zeros)

    def read(self) -> dict[str, np.ndarray]:
        """See `KVCache.read`."""
        return {name: buffer.cpu().numpy().copy() for name, buffer in self.buffers.items()}

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """See `KVCache.write`."""
        tensors: dict[str, Any] = {name: torch.from_numpy(np.array(value)) for name, value in values.items()}
        super().write(tensors)


class TorchSession:
    """One graph of a `BridgeSTG` in eval mode, on any device, as a session of the runtime: arrays are on the host.

    Matmuls are in the dtype `autocast`, which a model whose parts have different dtypes needs; None: in the weights'.
    """

    preferences = Preferences()
    device = None

    def __init__(self, name: str, model: BridgeSTG, *, autocast: torch.dtype | None = None) -> None:
        self.graph = graph_contract(name, model.spec, variant="eager", opset=0)
        self._model, self._autocast = model, autocast

    @property
    def _device(self) -> torch.device:
        """The device of the model. A skeleton's parameters are on the meta device, its buffers are not."""
        return self._model.vision_encoder.scale.device

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, np.ndarray]:
        """Run the graph; see `bridge_stg.runtime.backends.session.Session.infer`."""
        check_feeds(self.graph, feeds, cache)
        device = self._device
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in feeds.items()}
        # The device context applies to tensors that the modules create: centres of patches, masks, ranges.
        with (
            torch.no_grad(), nullcontext() if device.type == "cpu" else device,
            nullcontext() if self._autocast is None else torch.autocast(device.type, self._autocast),
        ):  # fmt: skip
            if self.graph.cache is not None:
                return self._infer_cached(tensors, cache)
            outputs = getattr(self._model, self.graph.name)(**tensors)
        return {t.name: _on_host(output) for t, output in zip(self.graph.outputs, outputs)}

    def _infer_cached(self, tensors: dict[str, torch.Tensor], cache: KVCache | None) -> dict[str, np.ndarray]:
        contract, kv = cache_spec(self.graph), own_cache(self.graph, cache, TorchCache)
        past = [tensors.pop(name) for name in contract.past_names] if kv is None else list(kv.buffers.values())
        position = tensors["cache_position"]
        buffers = BufferCache(past, position)
        mask = visible_keys(position, tensors["input_ids"].shape[1], past[0].shape[2])
        results = self._model.language_model(**tensors, mask=mask, cache=buffers)
        outputs = {name: _on_host(output) for name, output in zip(("logits", "taps"), results)}
        if kv is None:
            return outputs | dict(zip(contract.written_names, map(_on_host, buffers.present)))
        kv.buffers = dict(zip(contract.past_names, buffers.present))
        return outputs

    def allocate_cache(self, *, batch: int, capacity: int) -> TorchCache:
        """See `Session.allocate_cache`."""
        return TorchCache(cache_spec(self.graph), batch=batch, capacity=capacity, device=self._device)

    def close(self) -> None:
        """Do nothing: the model owns its weights."""


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.float().cpu().numpy()
    return array


def torch_grounder(
    model: BridgeSTG, *, heads: str | None = None, text: TextOptions | None = None, autocast: torch.dtype | None = None
) -> Grounder:
    """Return a `Grounder` that runs a model's graphs in eager torch; raise ValueError without a tokenizer.

    `heads` and `text` are as for `Grounder.load`, `autocast` is as for `TorchSession`.
    """
    if model.tokenizer is None:
        raise ValueError("BridgeSTG(config, tokenizer): a tokenizer is needed to ground a query")
    sessions = {name: TorchSession(name, model, autocast=autocast) for name in graphs_of(model.spec)}
    return Grounder(sessions, model.spec, model.tokenizer, heads=heads, text=text)
