"""The interface of a backbone: a config, two torch modules, and the family's rules. docs/adapters.md explains it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bridge_stg.model.backbones.sections import NUMBERS, check_sections
from bridge_stg.model.vision import VisionEncoder
from bridge_stg.runtime.bundle.spec import Deviations, FramesSpec, LanguageSpec, Means, PromptSpec, TextSpec, VisionSpec
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import CheckpointError

FIXED_ROTARY = ("default", "linear", "yarn", "llama3")
"""Kinds of rotary embedding whose frequencies do not change with the length of the input."""


TUBE_MESSAGE = (
    'Given the query "{query}", for each frame, detect and localize the visual content described by the given textual '
    "query in JSON format. If the visual content does not exist in a frame, skip that frame. Output Format: "
    '[{"time": 1.0, "bbox_2d": [x_min, y_min, x_max, y_max], "label": ""}, '
    '{"time": 2.0, "bbox_2d": [x_min, y_min, x_max, y_max], "label": ""}, ...].'
)
"""Requests a tube. Source: Qwen3-VL's cookbook `video_understanding`, spatio-temporal grounding."""

SPAN_MESSAGE = (
    "Give you a textual query: '{query}'. When does the described content occur in the video? Please return the "
    'timestamp in seconds. Answer in JSON format: {"start": 1.0, "end": 2.0}.'
)
"""Requests a span. Source: the usual prompt of evaluations on Charades-STA. The last sentence is this project's: the
families' cookbooks request a list of all events, not one."""

IMAGE_MESSAGE = "Locate {query}, output its bbox coordinates using JSON format."
"""Requests a box in an image. Source: Qwen2.5-VL's cookbook `spatial_understanding`."""


class Backbone(ABC):
    """One family of vision-language models.

    Attributes:
        family: value of `model_type`.
        key_prefixes: prefixes of published keys → prefixes in transformers 5 (`model.visual.`,
            `model.language_model.`, `lm_head.`), which are used here. The longest match is replaced; other keys stay.
        image_mean: mean that the family's image processor subtracts, RGB in 0..1.
        image_std: standard deviation that it divides by, RGB in 0..1.
        token_side: side in pixels of the square that one visual token covers.
        config_class, vision_class, text_class: transformers' config, vision model and decoder.
        encoder_class: the family's encoder, around a `vision_class`.
    """

    family: ClassVar[str]
    key_prefixes: ClassVar[Mapping[str, str]] = {
        "visual.": "model.visual.",
        "model.layers.": "model.language_model.layers.",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.norm.": "model.language_model.norm.",
        "language_model.": "model.language_model.",
    }
    image_mean: ClassVar[Means]
    image_std: ClassVar[Means]
    token_side: ClassVar[int]
    config_class: ClassVar[Any]
    vision_class: ClassVar[type]
    text_class: ClassVar[type]
    encoder_class: ClassVar[type[VisionEncoder]]

    def build_config(self, values: Mapping[str, Any]) -> Any:
        """Return transformers' config object of a `config.json` without its `model_type`; may raise anything."""
        return self.config_class(**values)

    @abstractmethod
    def vision_spec(self, config: Any, *, mean: Means, std: Deviations) -> VisionSpec:
        """Return the geometry of the vision encoder, which decides the position tables among its inputs."""

    def vision_encoder(self, config: Any, spec: VisionSpec, *, attention: str) -> VisionEncoder:
        """Return the vision encoder with random weights in float32, which calls a registered attention function."""
        return self.encoder_class(build(self.vision_class, config.vision_config, attention=attention), spec)

    def text_model(self, config: Any, *, attention: str) -> nn.Module:
        """Return the decoder with random weights in float32: `embed_tokens`, `layers`, `norm` and `rotary_emb`.

        A layer is called as `layer(x, position_embeddings=(cos, sin), attention_mask=…, past_key_values=cache)`, and
        passes other keyword arguments to the attention function.
        """
        return build(self.text_class, config.text_config, attention=attention)

    @abstractmethod
    def rotary_axes(self, text_config: Any) -> Tensor:
        """Return the position (0 time, 1 row, 2 column) of each rotary frequency, int64 [head_dim / 2]."""

    @abstractmethod
    def prompt(self) -> PromptSpec:
        """Return the prompt of a new checkpoint: the family's chat template around one video."""

    def text_prompt(self) -> PromptSpec:
        """Return the prompt of a plain model, which has no bridge heads, as the family's processor writes it."""
        return self.prompt()

    def text(self) -> TextSpec:
        """Return the messages that request tubes, spans and boxes in text; boxes are integers from 0 to 1000."""
        return TextSpec(tube=TUBE_MESSAGE, span=SPAN_MESSAGE, image=IMAGE_MESSAGE, box_scale=1000)

    def text_frames(self, *, image_pixels: int | None, video_pixels: int | None) -> FramesSpec:
        """Return the frames of a plain model: at most 256 tokens per coarse group, 768 per frame.

        Args:
            image_pixels: maximum pixels of an image by the config of the folder's image processor; None: no limit.
            video_pixels: that of the video processor; the family decides whether it limits each frame or their sum.
        """
        token = self.token_side**2
        coarse, fine = min(256 * token, video_pixels or image_pixels or 2**28), min(768 * token, image_pixels or 2**28)
        return FramesSpec(
            coarse_fps=2.0, coarse_max_pixels=coarse, coarse_min_pixels=min(16 * token, coarse), max_coarse_groups=64,
            fine_fps=4.0, fine_max_pixels=fine, fine_min_pixels=min(64 * token, fine), max_fine_frames=64,
        )  # fmt: skip

    def frames(self) -> FramesSpec:
        """Return the frame rates and sizes of a new checkpoint: at most 128 tokens per coarse group, 256 per frame."""
        token = self.token_side**2
        return FramesSpec(
            coarse_fps=2.0, coarse_max_pixels=128 * token, coarse_min_pixels=16 * token, max_coarse_groups=64,
            fine_fps=4.0, fine_max_pixels=256 * token, fine_min_pixels=64 * token, max_fine_frames=64,
        )  # fmt: skip

    def config(self, values: Mapping[str, Any]) -> Any:
        """Return transformers' config object for the values of a backbone's `config.json`.

        Raises CheckpointError if transformers rejects the config, or the graphs do not support it.
        """
        # A copy, since transformers completes nested values in place.
        values = {key: copy.deepcopy(value) for key, value in values.items() if key != "model_type"}
        check_sections(values, self.family)
        try:
            config = self.build_config(values)
        except Exception as error:  # transformers validates configs with many exception types
            message = f"transformers rejects the backbone's config ({error!s:.300})"
            raise CheckpointError("checkpoint.bad_config", message) from error
        check_text(config.text_config)
        return config

    def language_spec(self, config: Any, *, num_bridging_queries: int, tapped_layers: Sequence[int]) -> LanguageSpec:
        """Return the sizes of the KV cache and the vocabulary."""
        text = config.text_config
        heads, groups = text.num_attention_heads, text.num_key_value_heads or text.num_attention_heads
        check_multiple("text_config.num_attention_heads", heads, "num_key_value_heads", groups)
        head_dim = getattr(text, "head_dim", None)
        if head_dim is None:
            check_multiple("text_config.hidden_size", text.hidden_size, "num_attention_heads", heads)
            head_dim = from_json(NUMBERS["head_dim"], text.hidden_size // heads, "text_config.head_dim")
        return LanguageSpec(
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            kv_heads=groups,
            head_dim=head_dim,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            num_bridging_queries=num_bridging_queries,
            tapped_layers=tuple(tapped_layers),
        )


def check_multiple(name: str, size: int, divisor: str, of: int) -> None:
    """Raise ValueError if one size of a config is not a multiple of another."""
    if size % of:
        raise ValueError(f"{name} is {size}, expected a multiple of {divisor} {of}")


def check_text(text: Any) -> None:
    """Raise CheckpointError for sliding-window attention and rotary frequencies that depend on the input's length."""
    kind = (text.rope_parameters or {}).get("rope_type", "default")
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        problem = (
            "has sliding-window attention (use_sliding_window), but the graphs attend to their whole KV cache; set "
            "use_sliding_window to false if the model was not trained with it"
        )
    elif kind not in FIXED_ROTARY:
        problem = f"has rope_type {kind!r}, which depends on the input's length; supported: {', '.join(FIXED_ROTARY)}"
    else:
        return
    raise CheckpointError("checkpoint.unsupported_backbone", f"the backbone's text_config {problem}")


def build(model: type, config: Any, *, attention: str) -> nn.Module:
    """Return a model of transformers with random weights in float32, whatever dtype its config names."""
    options = {"attn_implementation": attention, "dtype": torch.float32}
    built: nn.Module = model._from_config(config, **options)  # type: ignore[attr-defined]  # noqa: SLF001 - no public way
    return built


def vision_geometry(family: str, config: Any, mean: Means, std: Deviations, **more: Any) -> VisionSpec:
    """Return the spec of an encoder whose `vision_config` has Qwen's field names; `more` holds the family's fields."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    check_multiple("vision_config.hidden_size", vision.hidden_size, "num_heads", vision.num_heads)
    if vision.out_hidden_size != hidden:
        expected = f"expected that of text_config.hidden_size, {hidden}"
        raise ValueError(f"vision_config.out_hidden_size is {vision.out_hidden_size}, {expected}")
    return VisionSpec(
        family=family,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        hidden_size=vision.hidden_size,
        head_dim=vision.hidden_size // vision.num_heads,
        rope_theta=float(vision.rope_parameters["rope_theta"]),
        image_mean=mean,
        image_std=std,
        **more,
    )
