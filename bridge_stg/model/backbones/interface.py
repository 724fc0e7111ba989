"""What a backbone must provide: a config, two torch modules, and the family's rules around them.

docs/adapters.md explains each part and adds a family step by step.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bridge_stg.model.vision import VisionEncoder
from bridge_stg.runtime.bundle.spec import FramesSpec, LanguageSpec, PromptSpec, VisionSpec
from bridge_stg.runtime.errors import CheckpointError

FIXED_ROTARY = ("default", "linear", "yarn", "llama3")
"""Kinds of rotary embedding whose frequencies do not change with the length of the input."""


class Backbone(ABC):
    """One family of vision-language models.

    Attributes:
        family: its `model_type`.
        key_prefixes: beginnings of the keys found in published folders → ours, which are those of transformers 5
            (`model.visual.`, `model.language_model.`, `lm_head.`); the longest that fits counts, other keys stay.
        image_mean: of the family's image processor, RGB in 0..1.
        image_std: likewise.
    """

    family: ClassVar[str]
    key_prefixes: ClassVar[Mapping[str, str]]
    image_mean: ClassVar[tuple[float, float, float]]
    image_std: ClassVar[tuple[float, float, float]]

    @abstractmethod
    def build_config(self, values: Mapping[str, Any]) -> Any:
        """Return transformers' config object of a `config.json` without its `model_type`; may raise anything."""

    @abstractmethod
    def vision_spec(self, config: Any, *, mean: Sequence[float], std: Sequence[float]) -> VisionSpec:
        """Return the vision encoder's geometry; it says which position tables the encoder is fed."""

    @abstractmethod
    def vision_encoder(self, config: Any, spec: VisionSpec, *, attention: str) -> VisionEncoder:
        """Return the vision encoder with random weights in float32.

        Args:
            config: what `config` returned.
            spec: what `vision_spec` returned.
            attention: name in transformers' attention registry.
        """

    @abstractmethod
    def text_model(self, config: Any, *, attention: str) -> nn.Module:
        """Return the decoder with random weights in float32: `embed_tokens`, `layers`, `norm` and `rotary_emb`.

        A layer is called as `layer(x, position_embeddings=(cos, sin), attention_mask=…, past_key_values=cache)`, and
        hands other keyword arguments on to the attention function.
        """

    @abstractmethod
    def rotary_axes(self, text_config: Any) -> Tensor:
        """Return int64 [head_dim / 2]: which position (0 time, 1 row, 2 column) each rotary frequency reads."""

    @abstractmethod
    def prompt(self) -> PromptSpec:
        """Return the prompt that a new checkpoint of this family starts from: the chat template around one video."""

    @abstractmethod
    def frames(self) -> FramesSpec:
        """Return the frame rates and sizes that a new checkpoint of this family starts from."""

    def config(self, values: Mapping[str, Any]) -> Any:
        """Return transformers' config object of a backbone.

        Args:
            values: the backbone's own `config.json`.

        Raises:
            CheckpointError: transformers refuses it, or it asks for what the graphs cannot do.
        """
        # A copy, since transformers completes nested values in place.
        values = {key: copy.deepcopy(value) for key, value in values.items() if key != "model_type"}
        if values.get("quantization_config"):
            method = dict(values["quantization_config"]).get("quant_method", "an unnamed method")
            raise CheckpointError(
                "checkpoint.unsupported_dtype",
                f"the backbone's weights are quantized ({method}); start from the model that they were made from",
            )
        for part, named in (("vision_config", ()), ("text_config", ("num_hidden_layers", "hidden_size"))):
            if not values.get(part) and not (named and all(name in values for name in named)):
                raise CheckpointError(
                    "checkpoint.bad_config", f"the backbone's config has no {part}; a {self.family} model has one"
                )
        for part in ("vision_config", "text_config"):
            check_counts(values.get(part) or values, f"the backbone's {part if values.get(part) else 'config'}")
        try:
            config = self.build_config(values)
        except Exception as error:  # transformers validates configs with many exception types
            raise CheckpointError(
                "checkpoint.bad_config", f"the backbone's config is refused by transformers ({error})"
            ) from error
        check_text(config.text_config)
        return config

    def language_spec(self, config: Any, *, num_bridging_queries: int, tapped_layers: Sequence[int]) -> LanguageSpec:
        """Return the sizes that shape the KV cache and the ids."""
        text = config.text_config
        heads = text.num_attention_heads
        return LanguageSpec(
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            kv_heads=text.num_key_value_heads or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            num_bridging_queries=num_bridging_queries,
            tapped_layers=tuple(tapped_layers),
        )


MOST = {
    "depth": 2**10, "num_hidden_layers": 2**10, "num_heads": 2**10, "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10, "head_dim": 2**14, "hidden_size": 2**20, "intermediate_size": 2**22,
    "out_hidden_size": 2**20, "vocab_size": 2**24, "max_position_embeddings": 2**30, "patch_size": 2**10,
    "spatial_merge_size": 2**6, "temporal_patch_size": 2**6,
}  # fmt: skip
"""Beyond any model that is known; a slip of the pen would otherwise be built, layer by layer."""


def check_counts(section: Mapping[str, Any], where: str) -> None:
    """Refuse counts and sizes that no model has; one that is missing or None is left to transformers.

    Raises:
        CheckpointError: the message names the field.
    """
    for name, most in MOST.items():
        value = section.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise CheckpointError(
                "checkpoint.bad_config", f"{where} has {name} {value!r}; expected a whole number from 1 to {most}"
            )


def check_text(text: Any) -> None:
    """Refuse what the language model's graph does not do.

    Raises:
        CheckpointError: sliding-window attention, or rotary frequencies that follow the input's length.
    """
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise CheckpointError(
            "checkpoint.unsupported_backbone",
            "the backbone's text_config asks for sliding-window attention (use_sliding_window), but the graphs attend "
            "to their whole KV cache; set use_sliding_window to false if the model was not trained with it",
        )
    kind = (text.rope_parameters or {}).get("rope_type", "default")
    if kind not in FIXED_ROTARY:
        raise CheckpointError(
            "checkpoint.unsupported_backbone",
            f"the backbone's text_config has rope_type {kind!r}, whose frequencies follow the input's length; "
            f"supported: {', '.join(FIXED_ROTARY)}",
        )


def build(model: type, config: Any, *, attention: str) -> nn.Module:
    """Return a model of transformers' in float32, whatever dtype its config names."""
    built: nn.Module = model._from_config(config, attn_implementation=attention, dtype=torch.float32)  # type: ignore[attr-defined]
    return built
