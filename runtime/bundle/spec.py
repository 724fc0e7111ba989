"""Everything about a model that the chain needs besides its weights: preprocessing, prompt, answer and span rules.

These dataclasses are sections of both the checkpoint's config and the manifest, so that training, export and the
runtime read the same numbers. They know nothing of torch and of files.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from bridge_stg.runtime.bundle.typed_json import Between, Text
from bridge_stg.runtime.errors import BundleError

# Upper limits are far above any known model; they only keep a typo from building or decoding something huge.
Rate: TypeAlias = Annotated[float, Between(0.001, 1000)]
Pixels: TypeAlias = Annotated[int, Between(1, 2**28)]
Frames: TypeAlias = Annotated[int, Between(1, 2**16)]
Count: TypeAlias = Annotated[int, Between(1, 2**10)]
Merge: TypeAlias = Annotated[int, Between(1, 2**6)]
Width: TypeAlias = Annotated[int, Between(1, 2**20)]
Vocabulary: TypeAlias = Annotated[int, Between(1, 2**24)]
Tokens: TypeAlias = Annotated[int, Between(1, 2**30)]
Mean: TypeAlias = Annotated[float, Between(-10, 10)]
Means: TypeAlias = tuple[Mean, Mean, Mean]  # of red, green and blue
Deviation: TypeAlias = Annotated[float, Between(0.001, 10)]
Deviations: TypeAlias = tuple[Deviation, Deviation, Deviation]
Base: TypeAlias = Annotated[float, Between(1, 10**12)]
HeadDim: TypeAlias = Annotated[int, Between(2, 2**14, step=2)]
Index: TypeAlias = Annotated[int, Between(0, 2**10)]
Grid: TypeAlias = Annotated[int, Between(0, 2**12)]
Margin: TypeAlias = Annotated[float, Between(0, 10**6)]
Piece: TypeAlias = Annotated[str, Text()]
Word: TypeAlias = Annotated[str, Text(1)]
QueryForm: TypeAlias = Annotated[str, Text(parts=("{query}",))]
TrackForm: TypeAlias = Annotated[str, Text(parts=("{query}", "{box}"))]
TimeForm: TypeAlias = Annotated[str, Text(parts=("{time}",))]
TurnForm: TypeAlias = Annotated[str, Text(parts=("{message}",))]
ListStart: TypeAlias = Annotated[str, Text(parts=("[",))]
ListEnd: TypeAlias = Annotated[str, Text(parts=("]",))]
TokenId: TypeAlias = Annotated[int, Between(0, 2**24)]
Penalty: TypeAlias = Annotated[float, Between(0.1, 10)]

HEADS = ("bridge", "text")
"""Heads that answer queries: `bridge` (bridging queries and spatial decoder), `text` (spans and boxes as JSON)."""


@dataclass(frozen=True)
class FramesSpec:
    """Which frames are read, and at which size. Rates are in frames per second, sizes in pixels (height · width)."""

    coarse_fps: Rate = 2.0
    coarse_max_pixels: Pixels = 128 * 128
    coarse_min_pixels: Pixels = 32 * 32
    max_coarse_groups: Frames = 64
    fine_fps: Rate = 4.0
    fine_max_pixels: Pixels = 256 * 256
    fine_min_pixels: Pixels = 32 * 32
    max_fine_frames: Frames = 64
    encoder_chunk_groups: Frames = 16  # maximum groups per call of the vision encoder; limits its memory on long videos
    encoder_chunk_patches: Tokens = 8192  # maximum patches per call (but at least one group); limits its memory too
    max_visual_tokens: Tokens | None = None  # of one video's coarse frames; None: as many as the other fields allow
    window_s: Rate | None = None  # seconds of a video at once, if longer ones are searched; None: by max_coarse_groups

    def __post_init__(self) -> None:
        for name in ("coarse", "fine"):
            least, most = getattr(self, f"{name}_min_pixels"), getattr(self, f"{name}_max_pixels")
            if least > most:
                raise ValueError(f"{name}_min_pixels is {least}, expected at most {name}_max_pixels {most}")


@dataclass(frozen=True)
class VisionSpec:
    """The parts of the vision encoder's geometry that the host needs."""

    family: str
    patch_size: Count
    merge_size: Merge
    temporal_patch_size: Merge
    hidden_size: Width
    head_dim: Annotated[int, Between(4, 2**14, step=4)]
    deepstack_levels: Index
    position_grid: Grid  # side of the square grid of learned position embeddings; 0: the encoder has none
    rope_theta: Base = 10000.0
    image_mean: Means = (0.5, 0.5, 0.5)
    image_std: Deviations = (0.5, 0.5, 0.5)
    window_patches: Grid = 0  # side of an attention window in patches; 0: every block attends to the whole group
    tokens_per_second: Rate | None = None  # time positions per second in a stock prompt; None: it prints times


@dataclass(frozen=True)
class LanguageSpec:
    """The language model's sizes, from which its KV cache and token ids follow."""

    hidden_size: Width
    num_layers: Count
    kv_heads: Count
    head_dim: HeadDim
    vocab_size: Vocabulary
    max_positions: Tokens
    num_bridging_queries: Index  # 0 without bridge heads
    tapped_layers: tuple[Index, ...]  # empty without bridge heads

    def __post_init__(self) -> None:
        if any(layer >= self.num_layers for layer in self.tapped_layers):
            layers = f"the LLM has layers 0 to {self.num_layers - 1}"
            raise ValueError(f"tapped_layers is {list(self.tapped_layers)}, but {layers}")

    @property
    def bridging_ids(self) -> range:
        """Ids of the bridging queries: vocab … vocab + Q − 1."""
        return range(self.vocab_size, self.vocab_size + self.num_bridging_queries)


@dataclass(frozen=True)
class PromptSpec:
    """The prompt's text. `{query}`, `{box}` and `{time}` are filled in; everything else is literal."""

    head: Piece = "<|im_start|>user\n"
    group_open: Piece = "<|vision_start|>"
    visual_token: Word = "<|video_pad|>"
    group_close: Piece = "<|vision_end|>"
    query: QueryForm = "Find {query}.<|im_end|>\n<|im_start|>assistant\n"
    track: TrackForm = "Track {query}, first at {box}.<|im_end|>\n<|im_start|>assistant\n"
    time: TimeForm = "<{time} seconds>"
    prints_times: bool = True  # False: the visual tokens of all groups are adjacent, without `time` and group markers
    time_decimals: Annotated[int, Between(0, 6)] = 1
    between: Piece = " to "
    absent: Word = "none"
    max_query_characters: Annotated[int, Between(1, 100_000)] = 1000


@dataclass(frozen=True)
class TextSpec:
    """How a model answers in text: its chat template around a video or an image, and a message per task.

    `{query}` is the target, `{message}` is one of the messages or a user's question; all else is literal text.
    """

    tube: QueryForm  # message that requests a list of times and boxes
    span: QueryForm  # message that requests the start and end of the target
    image: QueryForm  # message that requests a box in one image
    video_turn: TurnForm = "<|vision_end|>{message}<|im_end|>\n<|im_start|>assistant\n"  # after a video's tokens
    image_head: Piece = "<|im_start|>user\n<|vision_start|>"  # before an image's tokens
    image_token: Word = "<|image_pad|>"
    image_turn: TurnForm = "<|vision_end|>{message}<|im_end|>\n<|im_start|>assistant\n"  # after an image's tokens
    system_turn: TurnForm | None = "<|im_start|>system\n{message}<|im_end|>\n"  # None: chats are not supported
    user_turn: TurnForm | None = "<|im_start|>user\n{message}<|im_end|>\n"  # a message of a chat without its video
    assistant_turn: TurnForm | None = "<|im_start|>assistant\n{message}<|im_end|>\n"  # an earlier answer
    list_open: ListStart = "```json\n[\n\t"  # the JSON list of an answer, as the family writes it
    list_separator: Piece = ",\n\t"
    list_close: ListEnd = "\n]\n```"
    box_scale: Annotated[int, Between(0, 10**6)] = 1000  # boxes are integers from 0 to this; 0: pixels of the frame
    stop_ids: tuple[TokenId, ...] = ()  # ids that end an answer
    repetition_penalty: Penalty = 1.0  # of answers without a grammar


@dataclass(frozen=True)
class SpanSpec:
    """How a named span becomes a tube."""

    margin_s: Margin | None = None  # seconds searched on each side of the named span; None: one coarse group interval
    presence_threshold: Annotated[float, Between(0, 1)] = 0.5


@dataclass(frozen=True)
class KnowsSpec:
    """What a model was trained to find; for models that know little."""

    summary: Word  # one sentence for people
    words: tuple[Word, ...] = ()  # every word of the queries that it was trained on; empty: no word is reported


@dataclass(frozen=True)
class ModelSpec:
    """Everything that the chain needs to know about a model besides its graphs and tokenizer.

    `heads` is one of `HEADS`. A `text` model has no spatial decoder, taps and feature maps; a `bridge` model can answer
    in text as well if it has the section `text`.
    """

    vision: VisionSpec
    language: LanguageSpec
    frames: FramesSpec = field(default_factory=FramesSpec)
    prompt: PromptSpec = field(default_factory=PromptSpec)
    span: SpanSpec = field(default_factory=SpanSpec)
    heads: str = "bridge"
    text: TextSpec | None = None
    trained: bool = True  # False: the bridging and spatial parts are random, as `init` makes them
    knows: KnowsSpec | None = None  # None: not stated

    def __post_init__(self) -> None:
        bridging = (self.language.num_bridging_queries > 0, bool(self.language.tapped_layers))
        if self.heads not in HEADS:
            raise ValueError(f"heads is {self.heads!r}, expected one of {', '.join(HEADS)}")
        if bridging != (self.heads == "bridge",) * 2:
            counts = f"{self.language.num_bridging_queries} bridging queries and taps {self.language.tapped_layers}"
            raise ValueError(f"heads is {self.heads!r}, which does not fit {counts}")
        if self.heads == "text" and self.text is None:
            raise ValueError("heads is 'text', but the section text is missing")

    def is_trained(self, heads: str | None = None) -> bool:
        """Return whether `heads` were trained, by default the model's own. Text heads need no training."""
        return self.trained or (heads or self.heads) == "text"

    def unknown_words(self, query: str) -> tuple[str, ...]:
        """Return the words of a query that the section `knows` does not list, casefolded, without duplicates."""
        known = _vocabulary(self.knows.words) if self.knows else frozenset()
        return tuple(word for word in dict.fromkeys(_words(query)) if word not in known) if known else ()


def _words(text: str) -> list[str]:
    """Return the runs of letters, with their combining marks, of a casefolded text."""
    folded = unicodedata.normalize("NFC", text).casefold()
    letters = "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in folded)
    return letters.split()


@functools.lru_cache(maxsize=8)
def _vocabulary(words: tuple[str, ...]) -> frozenset[str]:
    """Return the casefolded words in a list of texts."""
    return frozenset(part for word in words for part in _words(word))


def chosen_heads(spec: ModelSpec, heads: str | None) -> str:
    """Return the heads that answer queries: `heads`, by default the model's. Raises BundleError if it lacks them."""
    chosen = spec.heads if heads is None else heads
    if chosen not in HEADS:
        raise BundleError("options.invalid", f"heads={heads!r}: expected one of {', '.join(HEADS)}")
    if chosen == "bridge" and spec.heads == "text":
        message = "this bundle has text heads only; leave out --heads bridge, or export a Bridge-STG checkpoint"
        raise BundleError("bundle.no_heads", message)
    if chosen == "text" and spec.text is None:
        message = "this bundle cannot answer in text: its checkpoint's config.json has no section `text`"
        raise BundleError("bundle.no_heads", f"{message}; leave out --heads text")
    return chosen
