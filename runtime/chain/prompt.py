"""From a video's times and a query to ids, visual indices and positions.

The prompt consists of segments that are tokenized separately. The first depends on the video alone, so that its KV
cache is computed once for all queries. Knows nothing of frames and of how answers are decoded.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec, PromptSpec
from bridge_stg.runtime.chain.positions import VisualGrid, stock_positions
from bridge_stg.runtime.errors import BundleError, QueryError, VideoError
from bridge_stg.runtime.video.token_budget import Budget


class Tokenizer:
    """A `tokenizer.json`, read with the `tokenizers` package."""

    def __init__(self, backend: object) -> None:
        self._backend = backend

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer; raise BundleError if the file is missing or is not one.

        Truncation, padding and dropout, which are left over from training, are switched off.
        """
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            message = f"{path}: no such file; a checkpoint and a bundle contain a tokenizer.json"
            raise BundleError("bundle.missing_file", message) from None
        except Exception as error:  # the package raises bare Exception
            message = f"{path}: is not a tokenizer.json that the tokenizers package can read ({error})"
            raise BundleError("bundle.bad_tokenizer", message) from error
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        return cls(backend)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, None if it is not one."""
        found: int | None = self._backend.token_to_id(token)  # type: ignore[attr-defined]
        return found

    def to_json(self) -> str:
        """Return the content of tokenizer.json as it is used here."""
        return str(self._backend.to_str())  # type: ignore[attr-defined]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, nothing added before or after."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)  # type: ignore[attr-defined]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included."""
        return str(self._backend.decode(list(map(int, ids)), skip_special_tokens=False))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Segment:
    """A part of the prompt: input_ids, visual_index int64 [L], positions int64 [3, L] (time, row, column)."""

    input_ids: np.ndarray
    visual_index: np.ndarray
    positions: np.ndarray
    next_position: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def part(self, start: int, stop: int) -> Segment:
        """Return tokens start … stop − 1."""
        taken = slice(start, stop)
        return Segment(self.input_ids[taken], self.visual_index[taken], self.positions[:, taken], self.next_position)

    def with_rows(self, offset: int) -> Segment:
        """Return the segment with `offset` added to the rows of its visual tokens."""
        index = np.where(self.visual_index > 0, self.visual_index + offset, 0)
        return Segment(self.input_ids, index, self.positions, self.next_position)

    def followed_by(self, ids: Sequence[int]) -> Segment:
        """Return the segment followed by text tokens, whose positions continue its own."""
        return join_segments([self, text_segment(ids, self.next_position)])


def text_segment(ids: Sequence[int] | np.ndarray, start_position: int) -> Segment:
    """Return text tokens as a segment whose positions count up from `start_position`."""
    ids = np.asarray(ids, np.int64)
    positions = np.broadcast_to(start_position + np.arange(len(ids), dtype=np.int64), (3, len(ids)))
    return Segment(ids, np.zeros(len(ids), np.int64), positions.copy(), start_position + len(ids))


def join_segments(segments: Sequence[Segment]) -> Segment:
    """Return segments as one, in their order."""
    return Segment(
        input_ids=np.concatenate([segment.input_ids for segment in segments]),
        visual_index=np.concatenate([segment.visual_index for segment in segments]),
        positions=np.concatenate([segment.positions for segment in segments], axis=1),
        next_position=segments[-1].next_position,
    )


def time_numbers(group_times: Sequence[float] | np.ndarray, spec: PromptSpec) -> list[str]:
    """Return the time of each group in seconds as text; raise VideoError if two groups have the same text."""
    numbers = [f"{max(float(time), 0.0):.{spec.time_decimals}f}" for time in group_times]
    for earlier, later in pairwise(numbers):
        if float(later) <= float(earlier):
            message = (
                f"the frames at {earlier} s and {later} s are printed as one time; sample the video at a lower rate"
            )
            raise VideoError("video.times_too_close", message)
    return numbers


def time_strings(group_times: Sequence[float] | np.ndarray, spec: PromptSpec) -> list[str]:
    """Return the text before each group's tokens, which contains its time; raise VideoError as `time_numbers`."""
    return [spec.time.replace("{time}", number) for number in time_numbers(group_times, spec)]


def video_segment(
    tokenizer: Tokenizer,
    spec: ModelSpec,
    group_times: Sequence[float] | np.ndarray,
    grid: tuple[int, int],
    *,
    interval_s: float | None = None,
) -> Segment:
    """Return the prefix that depends on the video alone: the head, then for each group its time and its tokens.

    Without printed times, the tokens of all groups are adjacent, at the positions of `stock_positions`. Otherwise they
    are Qwen3-VL's interleaved MRoPE (transformers, `get_rope_index`): text counts up in all three rows; the
    tokens of a group share one time, and the text after them continues past the larger side. `group_times` [G] are in
    seconds; `grid` is (rows, columns) of visual tokens per group, after merging; `interval_s` are the seconds between
    two samples, by default those that the first two groups have (the last group of a video may be padded).
    """
    prompt = spec.prompt
    rows, columns = grid
    tokens = rows * columns
    if not prompt.prints_times:
        between_s = float(group_times[1] - group_times[0]) if len(group_times) > 1 else 0.0
        between_s = between_s if interval_s is None else interval_s * spec.vision.temporal_patch_size
        visual = VisualGrid(len(group_times), rows, columns, between_s)
        return visual_segment(tokenizer, spec, prompt.head, prompt.visual_token, visual)
    visual_ids = np.full(tokens, token_id(tokenizer, prompt.visual_token), np.int64)
    opening, closing = tokenizer.encode(prompt.group_open), tokenizer.encode(prompt.group_close)
    row, column = np.divmod(np.arange(tokens, dtype=np.int64), columns)
    segments = [text_segment(tokenizer.encode(prompt.head), 0)]
    for group, text in enumerate(time_strings(group_times, prompt)):
        segments.append(text_segment(tokenizer.encode(text) + opening, segments[-1].next_position))
        start = segments[-1].next_position
        positions = np.stack([np.full_like(row, start), start + row, start + column])
        visual_index = 1 + group * tokens + np.arange(tokens, dtype=np.int64)
        segments.append(Segment(visual_ids, visual_index, positions, start + max(rows, columns)))
        segments.append(text_segment(closing, segments[-1].next_position))
    return join_segments(segments)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a text that must be one token; raise BundleError if it is not."""
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise BundleError("bundle.bad_tokenizer", f"tokenizer.json: {token!r} must be one token, found {len(ids)}")
    return ids[0]


def visual_segment(tokenizer: Tokenizer, spec: ModelSpec, head: str, token: str, grid: VisualGrid) -> Segment:
    """Return the text `head` and the visual tokens of one image or video, as the family's own processor writes them.

    The text that follows has positions from `next_position` on, which may be below those of a long video's tokens.
    """
    before = tokenizer.encode(head)
    count = grid.groups * grid.rows * grid.columns
    ids = np.array(before + [token_id(tokenizer, token)] * count, np.int64)
    visual_index = np.concatenate([np.zeros(len(before), np.int64), 1 + np.arange(count, dtype=np.int64)])
    positions, _ = stock_positions(spec.vision, visual_index > 0, [grid])
    return Segment(ids, visual_index, positions, len(before) + max(grid.rows, grid.columns))


def video_budget(
    tokenizer: Tokenizer,
    spec: ModelSpec,
    max_visual_tokens: int | None,
    *,
    capacity: int | None = None,
    answer_tokens: int = 0,
) -> Budget:
    """Return what a video may take of the prompt so that a query and its answer still fit after it.

    The room for a query is one position per character that it may have, at most a quarter of the model's positions; the
    room for a text answer is `answer_tokens`, at most a quarter as well. `capacity` is the size of an engine's KV cache
    in tokens, where that is fixed. Raises VideoError if `max_visual_tokens` is not a whole number of 1 or more.
    """
    prompt, language = spec.prompt, spec.language
    positions = language.max_positions if capacity is None else min(language.max_positions, capacity)
    boxes = (None, (0.5, 0.5, 1.0, 1.0))  # a query alone, and one with the box to track
    query = max(query_segment(tokenizer, spec, "a", 0, first_box=box).next_position for box in boxes)
    after_video = query + min(prompt.max_query_characters, positions // 4) + language.num_bridging_queries
    after_video += min(answer_tokens, positions // 4)

    def text_positions(group_times: np.ndarray) -> int:
        visual = len(group_times) if prompt.prints_times else 1  # positions of visual tokens in a grid of 1 × 1
        video = video_segment(tokenizer, spec, group_times, (1, 1)).next_position - visual
        longest = max(len(tokenizer.encode(text)) for text in time_strings(group_times, prompt))
        return video + after_video + 2 * longest + len(tokenizer.encode(prompt.between))

    tokens = spec.frames.max_visual_tokens if max_visual_tokens is None else max_visual_tokens
    return Budget(visual_tokens=tokens, positions=positions, capacity=capacity, text_positions=text_positions)


def query_segment(
    tokenizer: Tokenizer, spec: ModelSpec, query: str, start_position: int, *, first_box: Sequence[float] | None = None
) -> Segment:
    """Return the instruction and the query, up to where the answer begins.

    `start_position` is the video segment's `next_position`; `first_box` is a box to track, xyxy in 0..1, printed as
    four integers 0–999.

    Raises:
        QueryError: the query is empty, too long, or contains control characters or the prompt's own markers.
    """
    text = check_query(spec.prompt, query)
    form = spec.prompt.query
    if first_box is not None:
        numbers = np.clip(np.round(np.asarray(first_box, np.float64) * 999), 0, 999).astype(int)
        form = spec.prompt.track.replace("{box}", " ".join(map(str, numbers)))
    before, _, after = form.partition("{query}")
    return text_segment(tokenizer.encode(before + text + after), start_position)


def query_too_long(position: int, most: int) -> QueryError:
    """Return the error of a query after which the model, of `most` positions, has no room left for an answer."""
    message = f"after this video, the query ends at position {position} of {most}; shorten one of them"
    return QueryError("query.too_long", message)


def check_query(spec: PromptSpec, query: str, *, max_characters: int | None = None) -> str:
    """Return the query in the form that the prompt uses: Unicode NFC, blanks collapsed, one closing full stop dropped.

    `max_characters` is by default the model's own limit. Raises QueryError like `query_segment`.
    """
    most = spec.max_query_characters if max_characters is None else max_characters
    text = check_text(query, max_characters=most).removesuffix(".").rstrip()
    if not any(character.isalnum() or ord(character) > 0xFF for character in text):
        message = f'the query {query!r} has no words; expected text, such as "the red car"'
        raise QueryError("query.empty", message)
    return text


def check_text(given: str, *, max_characters: int) -> str:
    """Return a text of a user in Unicode NFC with blanks collapsed.

    Raises QueryError if it is too long, or contains control characters or the prompt's own markers.
    """
    if not isinstance(given, str):
        raise QueryError("query.not_text", f"a query must be a string, found {type(given).__name__}")
    if len(given) > max_characters:
        message = f"the query has {len(given):,} characters, and at most {max_characters:,} are possible"
        raise QueryError("query.too_long", message)
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"the query is not valid Unicode text ({error.reason} at character {error.start})"
        raise QueryError("query.bad_characters", message) from None
    text = " ".join(unicodedata.normalize("NFC", given).split())
    bad = next((c for c in text if unicodedata.category(c) == "Cc"), "<|" if "<|" in text else None)
    if bad is not None:
        message = f"the query contains {bad!r}; expected plain text without control characters and prompt markers"
        raise QueryError("query.bad_characters", message)
    return text
