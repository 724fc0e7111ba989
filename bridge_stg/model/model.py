"""Bridge-STG in torch: vision encoder, language model and spatial decoder, and the eager reference of the chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bridge_stg.model.attention import MATMUL
from bridge_stg.model.backbones import backbone
from bridge_stg.model.bridging import BridgingQueries
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.model.language_model import LanguageModel
from bridge_stg.model.spatial_decoder import SpatialDecoder
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.model.vision import normalization
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.grounder import Grounder

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
        self.spec = config.model_spec()
        family = backbone(config.backbone)
        values = family.config(config.backbone)
        text = values.text_config
        self.vision_encoder = family.vision_encoder(values, self.spec.vision, attention=attention)
        language = family.text_model(values, attention=attention)
        lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if values.tie_word_embeddings:
            lm_head.weight = language.embed_tokens.weight
        queries = BridgingQueries(self.spec.language.num_bridging_queries, text.hidden_size)
        axes = family.rotary_axes(text)
        if len(axes) != self.spec.language.head_dim // 2:
            raise CheckpointError(
                f"the backbone's mrope_section covers {len(axes)} rotary frequencies, but a head of "
                f"{self.spec.language.head_dim} channels has {self.spec.language.head_dim // 2}"
            )
        self.language_model = LanguageModel(language, lm_head, queries, self.spec.language, axes)
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

    def fixed_buffers(self) -> dict[str, Tensor]:
        """Compute all buffers that no checkpoint holds, by name: a model of meta or fake tensors lacks their values.

        To be called outside of `FakeTensorMode` and of a meta device context.
        """
        scale, shift = normalization(self.spec.vision)
        axes = backbone(self.config.backbone).rotary_axes(self.language_model.model.config)
        found = {"vision_encoder.scale": scale, "vision_encoder.shift": shift, "language_model.rotary_axis": axes}
        for name, module in self.named_modules():
            if "inv_freq" in module._buffers:  # transformers' rotary embeddings follow from their config alone
                fresh = type(module)(module.config)
                found |= {f"{name}.{buffer}": value for buffer, value in fresh.named_buffers(recurse=False)}
        return found

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
        max_visual_tokens: int | None = None,
    ) -> Grounding:
        """Ground a query in a video, eagerly: same frames, prompt, grammar and span rules as the runtime.

        Args:
            video: path of a video or image, uint8 [H, W, 3] array, or an iterator of (seconds, uint8 [H, W, 3]).
            query: the sentence.
            allow_none: whether `none` is an answer.
            deadline_s: seconds after which the call raises `Interrupted`.
            cancel: object with `is_set()`, or a callable; stops the call when true.
            progress: called with (stage, done, total).
            max_visual_tokens: what the video may take of the prompt; see `Grounder.ground`.
        """
        was_training = self.training
        self.eval()
        try:
            with self.grounder() as grounder:
                return grounder.ground(
                    video,
                    query,
                    allow_none=allow_none,
                    deadline_s=deadline_s,
                    cancel=cancel,
                    progress=progress,
                    max_visual_tokens=max_visual_tokens,
                )
        finally:
            self.train(was_training)
