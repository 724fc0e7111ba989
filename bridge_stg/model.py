"""Bridge-STG in torch: vision encoder, language model and spatial decoder, and the eager reference of the chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionModel

from bridge_stg.attention import MATMUL
from bridge_stg.bridging import BridgingQueries
from bridge_stg.config import BridgeSTGConfig
from bridge_stg.eager import TorchSession
from bridge_stg.language_model import LanguageModel
from bridge_stg.runtime.contracts import GRAPHS
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.prompt import Tokenizer
from bridge_stg.runtime.tubes import Grounding
from bridge_stg.spatial_decoder import SpatialDecoder
from bridge_stg.vision import VisionEncoder

KEY_PREFIXES = {
    "vision_encoder.model.": "model.visual.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.bridging.": "bridging.queries.",
    "spatial_decoder.": "spatial_decoder.",
}
"""This module's names → the names in a checkpoint, which are the backbone's own on Hugging Face."""


class BridgeSTG(nn.Module):
    """The model (Tu et al., arXiv 2604.08014).

    Args:
        config: all sizes.
        tokenizer: needed by `ground`.
        attention: name in transformers' attention registry.
    """

    def __init__(self, config: BridgeSTGConfig, tokenizer: Tokenizer | None = None, *, attention: str = MATMUL) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.spec = config.chain_spec()
        backbone = config.backbone_config()
        text = backbone.text_config
        visual = Qwen3VLVisionModel._from_config(backbone.vision_config, attn_implementation=attention)
        language = Qwen3VLTextModel._from_config(text, attn_implementation=attention)
        lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if backbone.tie_word_embeddings:
            lm_head.weight = language.embed_tokens.weight
        queries = BridgingQueries(self.spec.language.num_bridging_queries, text.hidden_size)
        self.vision_encoder = VisionEncoder(visual, self.spec.vision)
        self.language_model = LanguageModel(language, lm_head, queries, self.spec.language)
        self.spatial_decoder = SpatialDecoder(
            config.spatial_decoder,
            channels=self.spec.vision.hidden_size,
            num_taps=len(self.spec.language.tapped_layers),
            num_queries=self.spec.language.num_bridging_queries,
            hidden_size=text.hidden_size,
        )

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding table."""
        return self.language_model.lm_head.weight is self.language_model.model.embed_tokens.weight

    def grounder(self) -> Grounder:
        """Return the runtime's chain over this model's eager graphs: the reference that exports are compared to."""
        if self.tokenizer is None:
            raise ValueError("BridgeSTG(config, tokenizer): a tokenizer is needed to ask a query")
        sessions = {name: TorchSession(name, self) for name in GRAPHS}
        return Grounder(sessions, self.spec, self.tokenizer)

    @torch.no_grad()
    def ground(
        self,
        video: Any,
        query: str,
        *,
        allow_none: bool = True,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Callable[..., None] | None = None,
    ) -> Grounding:
        """Ground a query in a video, eagerly: same frames, prompt, grammar and span rules as the runtime.

        Args:
            video: path of a video or image, uint8 [H, W, 3] array, or an iterator of (seconds, uint8 [H, W, 3]).
            query: the sentence.
            allow_none: whether `none` is an answer.
            deadline_s: seconds after which the call raises `Interrupted`.
            cancel: object with `is_set()`, or a callable; stops the call when true.
            progress: called with (stage, done, total).
        """
        was_training = self.training
        self.eval()
        try:
            with self.grounder() as grounder:
                return grounder.ground(
                    video, query, allow_none=allow_none, deadline_s=deadline_s, cancel=cancel, progress=progress
                )
        finally:
            self.train(was_training)
