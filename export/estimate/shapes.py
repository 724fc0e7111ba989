"""The sizes of a model from which operations and bytes are counted, read from a config or from the graphs of a bundle.

Neither needs weights: of a checkpoint only the config is read, of a bundle only the manifest and the graphs' structure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_stg.export.estimate.known import KNOWN
from bridge_stg.export.graph.blocks import FLOAT, HEAD, Matmul, find_matmuls, find_tables
from bridge_stg.runtime.bundle.bundle import MANIFEST, Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import BridgeError, CheckpointError

if TYPE_CHECKING:
    from bridge_stg.model.config import BridgeSTGConfig

VISION, LANGUAGE, SPATIAL = GRAPHS
GATED_VISION = ("qwen2_5_vl",)
"""Families whose vision blocks have a gated MLP of three matrices; the others have two."""
_BLOCK = re.compile(r"\.(?:blocks|layers)\.(\d+)\.")


@dataclass(frozen=True)
class ModelShape:
    """Numbers of matmul weights, and the sizes that attention, cache and activations follow from.

    Attributes:
        spec: preprocessing, prompt and heads.
        patch_embed, blocks, mergers: weights of the vision encoder, for each patch and (mergers) each visual token.
        depth: number of vision blocks; `full_blocks` of them attend to all patches of a group, the others to a window.
        vision_inner: width of the MLPs of the vision encoder.
        layers: weights of all decoder layers.
        query_width: heads times channels of a head, of the queries.
        inner: width of the MLPs of the language model.
        tied: whether the head is the embedding table.
        spatial_width, spatial_layers, spatial_inner: sizes of the spatial decoder; 0 without one.
        dtypes: precision of most weights of each graph, of a bundle; empty: not fixed.
        stored: bytes of each graph's weights, of a bundle; empty: follow from the precision.
    """

    spec: ModelSpec
    patch_embed: int
    blocks: int
    mergers: int
    depth: int
    full_blocks: int
    vision_inner: int
    layers: int
    query_width: int
    inner: int
    tied: bool
    spatial_width: int = 0
    spatial_layers: int = 0
    spatial_inner: int = 0
    dtypes: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)

    @property
    def head(self) -> int:
        """Weights of the head, and of the embedding table."""
        return self.spec.language.hidden_size * self.spec.language.vocab_size

    @property
    def kv_width(self) -> int:
        """Key-value heads times channels of a head."""
        return self.spec.language.kv_heads * self.spec.language.head_dim

    @property
    def spatial(self) -> int:
        """Weights of the spatial decoder: three attentions, a feed-forward and two small heads per layer."""
        width, taps = self.spatial_width, len(self.spec.language.tapped_layers) * self.spec.language.hidden_size
        layer = 12 * width**2 + 2 * width * self.spatial_inner + 3 * width**2
        return self.spatial_layers * layer + width * (self.spec.vision.hidden_size + taps + 5 * width)

    @property
    def parameters(self) -> int:
        """Weights of all matmuls and of the embedding table."""
        vision = self.patch_embed + self.blocks + self.mergers
        return vision + self.layers + self.head * (1 if self.tied else 2) + self.spatial


def read_shape(model: str, *, heads: str | None = None) -> ModelShape:
    """Return the shape of a model.

    Args:
        model: name in `KNOWN`, or path of a checkpoint's or plain model's folder, of a `config.json`, or of a bundle.
        heads: `bridge` or `text`; None: those of a checkpoint or bundle, and text heads of a plain model.

    Raises:
        BridgeError: it is none of these, or does not have these heads.
        CheckpointError, BundleError: as reading them does.
    """
    path = Path(model)
    if (path / MANIFEST).is_file():
        found = shape_of_bundle(Bundle.load(path))
    else:
        found = shape_of_config(_config(model, path, heads))
    if heads is not None and found.spec.heads != heads:
        message = f"{model}: has {found.spec.heads} heads, so it cannot be estimated with {heads} heads"
        raise BridgeError("options.invalid", f"{message}; leave --heads out")
    return found


def _config(model: str, path: Path, heads: str | None) -> BridgeSTGConfig:
    from bridge_stg.model.backbones import FAMILIES
    from bridge_stg.model.backbones.sections import check_sections
    from bridge_stg.model.config import BridgeSTGConfig, check_model_type, read_json

    if model in KNOWN and not path.exists():
        return plain_config(KNOWN[model], heads, where=path)
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        known = f"or one of {', '.join(KNOWN)}"
        message = f"{model}: expected a checkpoint's folder, a plain model's folder, a config.json, a bundle, {known}"
        raise BridgeError("options.invalid", message)
    values = read_json(file, hint="a checkpoint is a folder with a config.json")
    check_model_type(values, file)
    if (family := values["model_type"]) not in FAMILIES:
        return BridgeSTGConfig.from_dict(values, str(file))
    try:
        check_sections(values, family)
    except CheckpointError as error:
        raise CheckpointError(error.code, f"{file}: {error.message}") from error
    if heads == "bridge" or file.name != "config.json":
        return plain_config(values, heads, where=file)
    from bridge_stg.checkpoint.checkpoint import load_config  # imports torch, which takes seconds: after all checks

    return load_config(file.parent)


def plain_config(values: Mapping[str, Any], heads: str | None, *, where: Path = Path("config.json")) -> BridgeSTGConfig:
    """Return the config of a plain model with text heads, or with the bridge heads that `init` would add.

    Raises CheckpointError, which names the file `where`, if the model cannot be used.
    """
    from bridge_stg.model.backbones import backbone
    from bridge_stg.model.config import BridgeSTGConfig, SpatialDecoderConfig

    family = backbone(values)
    config = BridgeSTGConfig(
        backbone=values, heads="text", prompt=family.text_prompt(), text=family.text(),
        frames=family.text_frames(image_pixels=None, video_pixels=None),
    ).checked(where)  # fmt: skip
    if heads != "bridge":
        return config
    decoder = SpatialDecoderConfig.fitting(config.backbone_config().text_config.hidden_size)
    config = BridgeSTGConfig(backbone=values, frames=family.frames(), prompt=family.prompt(), spatial_decoder=decoder)
    return config.checked(where)


def shape_of_config(config: BridgeSTGConfig) -> ModelShape:
    """Return the shape of a config. Raises CheckpointError if its backbone cannot be used."""
    values, spec = config.backbone_config(), config.model_spec()
    text, vision = values.text_config, values.vision_config
    width, inner = vision.hidden_size, vision.intermediate_size
    patch = 3 * spec.vision.temporal_patch_size * spec.vision.patch_size**2 * width
    matrices = 3 if spec.vision.family in GATED_VISION else 2
    merged = width * spec.vision.merge_size**2
    full = getattr(vision, "fullatt_block_indexes", None)
    head = spec.language.head_dim
    query, kv = text.num_attention_heads * head, spec.language.kv_heads * head
    hidden = text.hidden_size
    layer = 2 * hidden * query + 2 * hidden * kv + 3 * hidden * text.intermediate_size
    decoder = None if config.heads == "text" else config.spatial_decoder
    tied = bool(getattr(values, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))
    return ModelShape(
        spec=spec, patch_embed=patch, blocks=vision.depth * (4 * width**2 + matrices * width * inner),
        mergers=(1 + spec.vision.deepstack_levels) * (merged**2 + merged * hidden),
        depth=vision.depth, full_blocks=vision.depth if full is None else len(full), vision_inner=inner,
        layers=text.num_hidden_layers * layer, query_width=query, inner=text.intermediate_size, tied=tied,
        spatial_width=decoder.width if decoder else 0, spatial_layers=decoder.num_layers if decoder else 0,
        spatial_inner=decoder.ffn_width if decoder else 0,
    )  # fmt: skip


def shape_of_bundle(bundle: Bundle) -> ModelShape:
    """Return the shape of a bundle, counted in its graphs, whose weights are not read."""
    import onnx_ir as ir

    spec = bundle.manifest.spec
    found: dict[str, list[Matmul]] = {}
    dtypes, stored, tied = {}, {}, False
    for graph, variants in bundle.manifest.graphs.items():
        entry = variants.get("standard") or variants.get("primitive") or next(iter(variants.values()))
        model = ir.load(bundle.graph_path(graph, entry.variant))
        found[graph] = find_matmuls(model, graph)
        floats = entry.precision.rpartition(" ")[2]  # `int8 w8a8 fp16` and `fp16` have fp16, `int4 w4` has fp32
        floats = floats if floats in ("fp16", "bf16") else "fp32"
        forms = Counter({floats: 0})
        for matmul in found[graph]:
            forms[floats if matmul.form == FLOAT else matmul.form] += matmul.k * matmul.n
        dtypes[graph] = max(forms, key=forms.__getitem__)
        stored[graph] = sum(file.size for file in entry.data)
        if graph == LANGUAGE:
            tables = {table.weight for table in find_tables(model, graph)}
            tied = any(matmul.weight in tables for matmul in found[graph] if matmul.block == HEAD)
    vision, language, spatial = (found.get(name, []) for name in GRAPHS)
    blocks = [matmul for matmul in vision if ".blocks." in matmul.block]
    layers = [matmul for matmul in language if ".layers." in matmul.block]
    decoder = [matmul for matmul in spatial if ".layers." in matmul.block]
    width = next((matmul.k for matmul in decoder), 0)
    depth = _count(blocks)
    per_patch = 3 * spec.vision.temporal_patch_size * spec.vision.patch_size**2
    return ModelShape(
        spec=spec, patch_embed=per_patch * spec.vision.hidden_size, blocks=_weights(blocks),
        mergers=_weights(matmul for matmul in vision if "merger" in matmul.block),
        depth=depth, full_blocks=depth if not spec.vision.window_patches else max(1, depth // 8),
        vision_inner=_inner(blocks), layers=_weights(layers),
        query_width=next((m.k for m in layers if "o_proj" in m.node), spec.language.hidden_size),
        inner=_inner(layers), tied=tied, spatial_width=width, spatial_layers=_count(decoder),
        spatial_inner=_inner(decoder), dtypes=dtypes, stored=stored,
    )  # fmt: skip


def _weights(matmuls: Any) -> int:
    return sum(matmul.k * matmul.n for matmul in matmuls)


def _count(matmuls: list[Matmul]) -> int:
    return len({match[1] for matmul in matmuls if (match := _BLOCK.search(matmul.block + "."))})


def _inner(matmuls: list[Matmul]) -> int:
    return max((matmul.n for matmul in matmuls), default=0)
