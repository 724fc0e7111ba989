"""The three graphs' contracts: names, dtypes and symbolic dims of every input and output.

B = requests, G = groups of P frames, L = new tokens, K = requested positions, S = KV capacity, V = visual tokens + 1,
F = fine frames, N = patches per frame, W = attention windows per frame. The exporter writes these into the manifest;
the eager reference and every backend follow them.
"""

from __future__ import annotations

from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec, TensorSpec
from bridge_stg.runtime.bundle.spec import ModelSpec, VisionSpec

GRAPHS = ("vision_encoder", "language_model", "spatial_decoder")
"""All graphs, in the order of the chain; see `graphs_of`."""

TOKEN_GROUPS = "token_groups"
"""int64 [1], number of groups to compute `visual_tokens` for: an optional input of vision encoders beyond the contract
(default: all groups). With 0, `visual_tokens` has no rows and the mergers cost nothing."""

DECODE = "ort-cpu-decode"
"""Variant of a quantized language model whose weights have the layout that onnxruntime on CPU decodes with; `ort-cpu`
runs calls of more than a few tokens."""


def graphs_of(spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of a model's graphs, in the order of the chain. Only bridge heads have a spatial decoder."""
    return GRAPHS if spec.heads == "bridge" else GRAPHS[:2]


def graph_contract(
    name: str,
    spec: ModelSpec,
    *,
    variant: str,
    opset: int,
    io_dtype: str = "float32",
    cache_update: str = "in_place",
    cache_dtype: str = "float32",
    precision: str = "fp32",
) -> GraphSpec:
    """Return the contract of one of `GRAPHS`, without its files.

    `io_dtype` is the dtype of visual_tokens, feature_map and taps; `cache_update` (`in_place` or `append`) and
    `cache_dtype` apply to the KV cache of the language model.
    """
    inputs, outputs, ranges = {
        "vision_encoder": _vision_encoder, "language_model": _language_model, "spatial_decoder": _spatial_decoder,
    }[name](spec, io_dtype)  # fmt: skip
    cache = None
    if name == "language_model":
        heads, head_dim = spec.language.kv_heads, spec.language.head_dim
        cache = CacheSpec(cache_update, spec.language.num_layers, heads, head_dim, cache_dtype)
        inputs += [TensorSpec(n, cache_dtype, ("B", heads, "S", head_dim)) for n in cache.past_names]
        length = "S" if cache_update == "in_place" else "L"
        outputs += [TensorSpec(n, cache_dtype, ("B", heads, length, head_dim)) for n in cache.written_names]
    return GraphSpec(name, variant, tuple(inputs), tuple(outputs), opset, precision, ranges, cache)


Parts = tuple[list[TensorSpec], list[TensorSpec], dict[str, tuple[int, "int | None"]]]


def _vision_encoder(spec: ModelSpec, io: str) -> Parts:
    vision, hidden = spec.vision, spec.language.hidden_size
    inputs = [
        TensorSpec("frames", "uint8", ("G", vision.temporal_patch_size, "height", "width", 3)),
        *_vision_tables(vision),
    ]
    outputs = [TensorSpec("visual_tokens", io, (1 + vision.deepstack_levels, f"G*N/{vision.merge_size**2}", hidden))]
    if spec.heads == "bridge":
        outputs.append(TensorSpec("feature_map", io, ("G", "h", "w", vision.hidden_size)))
    side = vision.patch_size * vision.merge_size
    ranges: dict[str, tuple[int, int | None]] = {"G": (1, None), "height": (side, None), "width": (side, None)}
    ranges |= {"N": (vision.merge_size**2, None)} | ({"W": (1, None)} if vision.window_patches else {})
    return inputs, outputs, ranges


def _vision_tables(vision: VisionSpec) -> list[TensorSpec]:
    """Return the inputs that `bridge_stg.runtime.chain.positions.vision_tables` computes, in the same order."""
    tables = []
    if vision.position_grid:
        tables += [TensorSpec("pos_index", "int64", ("N", 4)), TensorSpec("pos_weight", "float32", ("N", 4))]
    tables += [TensorSpec(name, "float32", ("N", vision.head_dim)) for name in ("rotary_cos", "rotary_sin")]
    if vision.window_patches:
        places = vision.window_patches**2
        tables += [TensorSpec("window_index", "int64", ("W", places)), TensorSpec("window_mask", "bool", ("W", places))]
        tables += [TensorSpec("window_place", "int64", ("N",))]
    return tables


def _language_model(spec: ModelSpec, io: str) -> Parts:
    language, levels = spec.language, spec.vision.deepstack_levels
    inputs = [
        TensorSpec("input_ids", "int64", ("B", "L")),
        TensorSpec("visual_index", "int64", ("B", "L")),
        TensorSpec("visual_tokens", io, (1 + levels, "V", language.hidden_size)),
        TensorSpec("positions", "int64", (3, "B", "L")),
        TensorSpec("cache_position", "int64", ("B",)),
        TensorSpec("output_index", "int64", ("B", "K")),
    ]
    outputs = [TensorSpec("logits", "float32", ("B", "K", language.vocab_size))]
    if language.tapped_layers:
        outputs.append(TensorSpec("taps", io, (len(language.tapped_layers), "B", "K", language.hidden_size)))
    return inputs, outputs, dict.fromkeys("BLKSV", (1, None))


def _spatial_decoder(spec: ModelSpec, io: str) -> Parts:
    language = spec.language
    taps = (len(language.tapped_layers), "B", language.num_bridging_queries, language.hidden_size)
    inputs = [
        TensorSpec("feature_map", io, ("F", "h", "w", spec.vision.hidden_size)),
        TensorSpec("taps", io, taps),
        TensorSpec("frame_times", "float32", ("F",)),
        TensorSpec("frame_mask", "bool", ("B", "F")),
    ]
    outputs = [TensorSpec("boxes", "float32", ("B", "F", 4)), TensorSpec("presence", "float32", ("B", "F"))]
    return inputs, outputs, dict.fromkeys("BFhw", (1, None))
