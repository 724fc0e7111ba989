"""The graphs as modules with tensors as inputs and outputs, in the order of their contracts.

Each module has its part of the model under the name that it has in `BridgeSTG`, so that parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bridge_stg.export.tracing.lowering import DOMAIN, SAME, Lowering
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.spec import ModelSpec


class VisionEncoderGraph(nn.Module):
    """frames and position tables → visual_tokens and, with bridge heads, feature_map."""

    def __init__(self, model: BridgeSTG, lowering: Lowering) -> None:
        super().__init__()
        self.vision_encoder = model.vision_encoder
        self.outputs = 2 if model.spec.heads == "bridge" else 1

    def forward(self, frames: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        """See the `forward` of the family's encoder in `bridge_stg.model.backbones`."""
        outputs: tuple[Tensor, ...] = self.vision_encoder(frames, *tables)
        return outputs[: self.outputs]


class LanguageModelGraph(nn.Module):
    """ids, positions and KV buffers → logits, with bridge heads taps, and the outputs of the cache contract."""

    def __init__(self, model: BridgeSTG, lowering: Lowering) -> None:
        super().__init__()
        self.language_model = model.language_model
        self.lowering = lowering

    def forward(  # noqa: PLR0917  # inputs of the contract, which a trace passes by position
        self,
        input_ids: Tensor,
        visual_index: Tensor,
        visual_tokens: Tensor,
        positions: Tensor,
        cache_position: Tensor,
        output_index: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `bridge_stg.model.language_model.LanguageModel.forward`; past_key/value_i [B, kv_heads, S, head_dim]."""
        cache = self.lowering.cache(list(past), cache_position)
        mask = self.lowering.mask(cache_position, input_ids.shape[1], past[0].shape[2])
        outputs = self.language_model(
            input_ids, visual_index, visual_tokens, positions, cache_position, output_index, mask, cache
        )
        return *outputs, *cache.written


class SpatialDecoderGraph(nn.Module):
    """feature_map, taps, frame_times and frame_mask → boxes, presence."""

    def __init__(self, model: BridgeSTG, lowering: Lowering) -> None:
        super().__init__()
        self.spatial_decoder = model.spatial_decoder

    def forward(self, feature_map: Tensor, taps: Tensor, frame_times: Tensor, frame_mask: Tensor) -> tuple[Tensor, ...]:
        """See `bridge_stg.model.spatial_decoder.SpatialDecoder.forward`."""
        outputs: tuple[Tensor, ...] = self.spatial_decoder(feature_map, taps, frame_times, frame_mask)
        return outputs


GRAPH_MODULES: Mapping[str, Callable[[BridgeSTG, Lowering], nn.Module]] = {
    "vision_encoder": VisionEncoderGraph,
    "language_model": LanguageModelGraph,
    "spatial_decoder": SpatialDecoderGraph,
}

_SIZES: Mapping[str, int] = {"G": 2, "B": 2, "L": 5, "K": 3, "S": 16, "V": 7, "F": 6, "h": 8, "w": 10, "W": 4}
_ROWS, _COLUMNS = 3, 5


def example(graph: GraphSpec, spec: ModelSpec) -> tuple[Tensor, ...]:
    """Return example inputs for the trace. No size is 1 and few are equal, so that the trace keeps dims free."""
    side = spec.vision.patch_size * spec.vision.merge_size
    patches = _ROWS * _COLUMNS * spec.vision.merge_size**2
    sizes = {**_SIZES, "height": _ROWS * side, "width": _COLUMNS * side, "N": patches}
    shapes = ([dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims] for tensor in graph.inputs)
    dtypes = (getattr(torch, tensor.dtype) for tensor in graph.inputs)
    return tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


def dynamic_shapes(graph: GraphSpec) -> tuple[object, ...]:
    """Return the dims of every input for torch.export: those of the contract that are symbols are free."""
    shapes = [
        {axis: torch.export.Dim.AUTO for axis, dim in enumerate(tensor.dims) if isinstance(dim, str)}
        for tensor in graph.inputs
    ]
    if graph.cache is not None:  # modules have `*past` and `*tables` (positions), which need a tuple of their own
        first = len(shapes) - len(graph.cache.past_names)
    elif graph.name == "vision_encoder":
        first = 1
    else:
        return tuple(shapes)
    return (*shapes[:first], tuple(shapes[first:]))


def with_shared_dims(graph: GraphSpec, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return inputs of a trace after nodes `Same`, which give dims of one name one symbol.

    torch.export has a symbol for each dim of each input, and proofs that two are equal take most of its time.
    """
    sizes: dict[str, int] = {}
    shared: list[Tensor] = []
    for tensor, spec in zip(tensors, graph.inputs, strict=True):
        for dim, size in zip(spec.dims, tensor.shape, strict=True):
            if isinstance(dim, str):
                sizes.setdefault(dim, size)
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        operator, dtype = f"{DOMAIN}::{SAME}", tensor.dtype
        shared.append(torch.onnx.ops.symbolic(operator, (tensor,), dtype=dtype, shape=shape, version=1))
    return tuple(shared)
