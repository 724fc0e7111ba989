"""What the chain must know about a model besides its weights: preprocessing, prompt, answer and span rules.

These dataclasses are the checkpoint's config sections and the manifest's sections alike, so that training,
export and the runtime read the same numbers. They know nothing of torch and nothing of files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a frozen dataclass from JSON values; lists become tuples.

    Raises:
        ValueError: a field is unknown or missing; the message names it and `where`.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known fields: {', '.join(fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: field {missing[0]!r} is missing")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class FramesSpec:
    """Which frames are read, and at which size. Rates are in frames a second, sizes in pixels (height · width)."""

    coarse_fps: float = 2.0
    coarse_max_pixels: int = 128 * 128
    coarse_min_pixels: int = 32 * 32
    max_coarse_groups: int = 64
    fine_fps: float = 4.0
    fine_max_pixels: int = 256 * 256
    fine_min_pixels: int = 32 * 32
    max_fine_frames: int = 64
    encoder_chunk_groups: int = 16
    """Groups that one call of the vision encoder may hold; bounds its memory on long videos."""
    encoder_chunk_patches: int = 8192
    """Patches that one call may hold, at least one group: bounds its memory at high resolutions."""
    max_visual_tokens: int | None = None
    """Visual tokens that the coarse frames of one video may take together; None: as many as the fields above allow."""


@dataclass(frozen=True)
class VisionSpec:
    """The vision encoder's geometry, as far as the host must know it."""

    family: str
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    hidden_size: int
    head_dim: int
    deepstack_levels: int
    position_grid: int
    """Side of the square grid of learned position embeddings; 0: the encoder has none."""
    rope_theta: float = 10000.0
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    window_patches: int = 0
    """Side of an attention window in patches; 0: every block attends to the whole group."""
    tokens_per_second: float | None = None
    """Steps of the time position a second in a stock prompt; None: a stock prompt prints each group's time."""


@dataclass(frozen=True)
class LanguageSpec:
    """The language model's sizes that shape its KV cache and its ids."""

    hidden_size: int
    num_layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    num_bridging_queries: int
    tapped_layers: tuple[int, ...]

    @property
    def bridging_ids(self) -> range:
        """Ids of the bridging queries: vocab … vocab + Q − 1."""
        return range(self.vocab_size, self.vocab_size + self.num_bridging_queries)


@dataclass(frozen=True)
class PromptSpec:
    """The prompt's text. `{query}`, `{box}` and `{time}` are filled in; everything else is literal."""

    head: str = "<|im_start|>user\n"
    group_open: str = "<|vision_start|>"
    visual_token: str = "<|video_pad|>"
    group_close: str = "<|vision_end|>"
    query: str = "Find {query}.<|im_end|>\n<|im_start|>assistant\n"
    track: str = "Track {query}, first at {box}.<|im_end|>\n<|im_start|>assistant\n"
    time: str = "<{time} seconds>"
    time_decimals: int = 1
    between: str = " to "
    absent: str = "none"
    max_query_characters: int = 1000


@dataclass(frozen=True)
class SpanSpec:
    """How a named span becomes a tube."""

    margin_s: float | None = None
    """Seconds looked at on each side of the named span; None: one coarse group interval."""
    presence_threshold: float = 0.5


@dataclass(frozen=True)
class ModelSpec:
    """Everything that the chain needs to know about a model besides its graphs and tokenizer."""

    vision: VisionSpec
    language: LanguageSpec
    frames: FramesSpec = field(default_factory=FramesSpec)
    prompt: PromptSpec = field(default_factory=PromptSpec)
    span: SpanSpec = field(default_factory=SpanSpec)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return JSON values, one object a section."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]], where: str = "spec") -> ModelSpec:
        """Read the sections that `to_dict` wrote.

        Raises:
            ValueError: a section or field is unknown or missing.
        """
        sections: dict[str, Any] = {
            "vision": VisionSpec,
            "language": LanguageSpec,
            "frames": FramesSpec,
            "prompt": PromptSpec,
            "span": SpanSpec,
        }
        built: dict[str, Any] = {
            name: from_dict(kind, values.get(name, {}), f"{where}.{name}") for name, kind in sections.items()
        }
        return cls(**built)
