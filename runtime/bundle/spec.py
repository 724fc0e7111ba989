"""Everything about a model that the chain needs besides its weights: preprocessing, prompt, answer and span rules.

These dataclasses are sections of both the checkpoint's config and the manifest, so that training, export and the
runtime read the same numbers. They know nothing of torch and of files.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FramesSpec:
    """Which frames are read, and at which size. Rates are in frames per second, sizes in pixels (height · width)."""

    coarse_fps: float = 2.0
    coarse_max_pixels: int = 128 * 128
    coarse_min_pixels: int = 32 * 32
    max_coarse_groups: int = 64
    fine_fps: float = 4.0
    fine_max_pixels: int = 256 * 256
    fine_min_pixels: int = 32 * 32
    max_fine_frames: int = 64
    encoder_chunk_groups: int = 16  # most groups per call of the vision encoder; limits its memory on long videos
    encoder_chunk_patches: int = 8192  # most patches per call (but at least one group); limits its memory too
    max_visual_tokens: int | None = None  # of all coarse frames of one video; None: as many as the other fields allow


@dataclass(frozen=True)
class VisionSpec:
    """The parts of the vision encoder's geometry that the host needs."""

    family: str
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    hidden_size: int
    head_dim: int
    deepstack_levels: int
    position_grid: int  # side of the square grid of learned position embeddings; 0: the encoder has none
    rope_theta: float = 10000.0
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    window_patches: int = 0  # side of an attention window in patches; 0: every block attends to the whole group
    tokens_per_second: float | None = None  # time positions per second in a stock prompt; None: it prints times


@dataclass(frozen=True)
class LanguageSpec:
    """The language model's sizes, from which its KV cache and token ids follow."""

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

    margin_s: float | None = None  # seconds searched on each side of the named span; None: one coarse group interval
    presence_threshold: float = 0.5


@dataclass(frozen=True)
class ModelSpec:
    """Everything that the chain needs to know about a model besides its graphs and tokenizer."""

    vision: VisionSpec
    language: LanguageSpec
    frames: FramesSpec = field(default_factory=FramesSpec)
    prompt: PromptSpec = field(default_factory=PromptSpec)
    span: SpanSpec = field(default_factory=SpanSpec)
