"""The model in torch: vision encoder, language model and, with bridge heads, the spatial decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bridge_stg.model.attention import MATMUL
from bridge_stg.model.backbones import backbone
from bridge_stg.model.bridging import BridgingQueries
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.model.language_model import LanguageModel
from bridge_stg.model.spatial_decoder import SpatialDecoder
from bridge_stg.model.vision import VisionEncoder, normalization
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.errors import CheckpointError

KEY_PREFIXES = {
    "vision_encoder.model.": "model.visual.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.bridging.": "bridging.queries.",
    "spatial_decoder.": "spatial_decoder.",
}
"""Prefixes of parameter names → prefixes of checkpoint keys, which are the backbone's own on Hugging Face."""


class BridgeSTG(nn.Module):
    """The model (Tu et al., arXiv 2604.08014). With text heads, it has no bridging queries and no spatial decoder.

    `torch_session.torch_grounder` needs the tokenizer; `attention` is a name in transformers' attention registry.
    """

    vision_encoder: VisionEncoder
    language_model: LanguageModel
    spatial_decoder: SpatialDecoder

    def __init__(self, config: BridgeSTGConfig, tokenizer: Tokenizer | None = None, *, attention: str = MATMUL) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.spec = config.model_spec()
        family = backbone(config.backbone)
        values = family.config(config.backbone)
        text = values.text_config
        self.vision_encoder = family.vision_encoder(values, self.spec.vision, attention=attention)
        language: Any = family.text_model(values, attention=attention)
        lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if values.tie_word_embeddings:
            lm_head.weight = language.embed_tokens.weight
        bridge = self.spec.heads == "bridge"
        queries = BridgingQueries(self.spec.language.num_bridging_queries, text.hidden_size) if bridge else None
        axes = family.rotary_axes(text)
        if len(axes) != self.spec.language.head_dim // 2:
            channels = self.spec.language.head_dim
            message = f"the backbone's mrope_section covers {len(axes)} rotary frequencies, but a head of {channels} "
            raise CheckpointError("checkpoint.bad_config", f"{message}channels has {channels // 2}")
        self.language_model = LanguageModel(language, lm_head, queries, self.spec.language, axes)
        if bridge:
            self.spatial_decoder = SpatialDecoder(
                config.spatial_decoder,
                channels=self.spec.vision.hidden_size,
                num_taps=len(self.spec.language.tapped_layers),
                num_queries=self.spec.language.num_bridging_queries,
                hidden_size=text.hidden_size,
            )

    @property
    def tied(self) -> bool:
        """Whether the head shares its weight with the embedding table."""
        return self.language_model.lm_head.weight is self.language_model.model.embed_tokens.weight

    def fixed_buffers(self) -> dict[str, Tensor]:
        """Compute, by name, all buffers that checkpoints do not contain and that a meta or fake model has no values of.

        Must be called outside of `FakeTensorMode` and of a meta device context.
        """
        scale, shift = normalization(self.spec.vision)
        axes = backbone(self.config.backbone).rotary_axes(self.language_model.model.config)
        found = {"vision_encoder.scale": scale, "vision_encoder.shift": shift, "language_model.rotary_axis": axes}
        for name, module in self.named_modules():
            if hasattr(module, "inv_freq"):  # transformers' rotary embeddings follow from their config alone
                fresh = type(module)(module.config)
                found |= {f"{name}.{buffer}": value for buffer, value in fresh.named_buffers(recurse=False)}
        return found
