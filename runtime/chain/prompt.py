"""From a video's times and a query to ids, visual indices and positions.

The prompt is made of segments that are tokenized separately. The first depends on the video alone, so that its KV
is computed once for every query. Knows nothing of frames and of how ids are decoded.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec, PromptSpec
from bridge_stg.runtime.errors import BundleError, QueryError, VideoError
from bridge_stg.runtime.video.token_budget import Budget


class Tokenizer:
    """A `tokenizer.json`, read with the `tokenizers` package."""

    def __init__(self, backend: object) -> None:
        self._backend = backend

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer.

        Raises:
            BundleError: the file is missing or is not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{path}: no such file; a checkpoint and a bundle hold a tokenizer.json") from None
        except Exception as error:  # the package raises bare Exception
            raise BundleError(
                f"{path}: is not a tokenizer.json that the tokenizers package can read ({error})"
            ) from error
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, nothing added before or after."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)  # type: ignore[attr-defined]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included."""
        return str(self._backend.decode(list(map(int, ids)), skip_special_tokens=False))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Segment:
    """A stretch of the prompt: input_ids, visual_index int64 [L], positions int64 [3, L] (time, row, column)."""

    input_ids: np.ndarray
    visual_index: np.ndarray
    positions: np.ndarray
    next_position: int

    def __len__(self) -> int:
        return len(self.input_ids)


def time_strings(group_times: Sequence[float] | np.ndarray, spec: PromptSpec) -> list[str]:
    """Return the time text of each group, times in seconds.

    Raises:
        VideoError: two groups would be printed alike, so that an answer could not name one of them.
    """
    numbers = [f"{max(float(time), 0.0):.{spec.time_decimals}f}" for time in group_times]
    for earlier, later in zip(numbers, numbers[1:]):
        if float(later) <= float(earlier):
            raise VideoError(
                f"the frames at {earlier} s and {later} s are too close for {spec.time_decimals} printed decimals; "
                "sample the video at a lower rate"
            )
    return [spec.time.replace("{time}", number) for number in numbers]


def text_segment(ids: Sequence[int] | np.ndarray, start_position: int) -> Segment:
    """Return plain ids as a segment whose positions count up from `start_position`."""
    ids = np.asarray(ids, np.int64)
    positions = np.broadcast_to(start_position + np.arange(len(ids), dtype=np.int64), (3, len(ids)))
    return Segment(ids, np.zeros(len(ids), np.int64), positions.copy(), start_position + len(ids))


def video_segment(
    tokenizer: Tokenizer, spec: ModelSpec, group_times: Sequence[float] | np.ndarray, grid: tuple[int, int]
) -> Segment:
    """Return the prefix that depends on the video alone: the head, then for each group its time and its tokens.

    Positions are Qwen3-VL's interleaved MRoPE (transformers, `get_rope_index`): text counts up in all three rows; the
    tokens of a group share one time, and the text after them goes on past the larger side.

    Args:
        tokenizer: the model's tokenizer.
        spec: rules of the prompt.
        group_times: [G], seconds.
        grid: (rows, columns) of visual tokens in a group, after merging.
    """
    prompt = spec.prompt
    rows, columns = grid
    visual_id = _single_id(tokenizer, prompt.visual_token)
    opening, closing = tokenizer.encode(prompt.group_open), tokenizer.encode(prompt.group_close)
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    ids: list[int] = []
    visual: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    cursor = 0

    def add_text(new: list[int]) -> None:
        nonlocal cursor
        segment = text_segment(new, cursor)
        ids.extend(new)
        visual.append(segment.visual_index)
        positions.append(segment.positions)
        cursor = segment.next_position

    add_text(tokenizer.encode(prompt.head))
    for group, text in enumerate(time_strings(group_times, prompt)):
        add_text(tokenizer.encode(text) + opening)
        ids.extend([visual_id] * (rows * columns))
        visual.append(1 + group * rows * columns + np.arange(rows * columns, dtype=np.int64))
        positions.append(np.stack([np.full_like(row, cursor), cursor + row, cursor + column]))
        cursor += max(rows, columns)
        add_text(closing)
    return Segment(np.asarray(ids, np.int64), np.concatenate(visual), np.concatenate(positions, 1), cursor)


def video_budget(
    tokenizer: Tokenizer, spec: ModelSpec, max_visual_tokens: int | None, *, capacity: int | None = None
) -> Budget:
    """Return what a video may take so that a query and its answer still fit behind it.

    The room kept for a query is one position for each character that it may have, at most a quarter of the model's.

    Args:
        tokenizer: the model's tokenizer.
        spec: rules of the prompt.
        max_visual_tokens: a bound; None: the spec's own.
        capacity: tokens that an engine's KV cache holds, where that is fixed; None: it grows.

    Raises:
        VideoError: the bound is not a whole number of 1 or more.
    """
    prompt, language = spec.prompt, spec.language
    positions = language.max_positions if capacity is None else min(language.max_positions, capacity)
    tasks = (None, (0.5, 0.5, 1.0, 1.0))  # a query alone, and one with the box that is to be tracked
    task = max(query_segment(tokenizer, spec, "a", 0, first_box=box).next_position for box in tasks)
    behind = task + min(prompt.max_query_characters, positions // 4) + language.num_bridging_queries

    def text_positions(group_times: np.ndarray) -> int:
        video = video_segment(tokenizer, spec, group_times, (1, 1)).next_position - len(group_times)
        longest = max(len(tokenizer.encode(text)) for text in time_strings(group_times, prompt))
        return video + behind + 2 * longest + len(tokenizer.encode(prompt.between))

    tokens = spec.frames.max_visual_tokens if max_visual_tokens is None else max_visual_tokens
    return Budget(visual_tokens=tokens, positions=positions, capacity=capacity, text_positions=text_positions)


def query_segment(
    tokenizer: Tokenizer,
    spec: ModelSpec,
    query: str,
    start_position: int,
    *,
    first_box: Sequence[float] | None = None,
) -> Segment:
    """Return the task and the query, up to where the answer begins.

    Args:
        tokenizer: the model's tokenizer.
        spec: rules of the prompt.
        query: the sentence; surrounding blanks and one closing full stop do not count.
        start_position: the video segment's `next_position`.
        first_box: xyxy in 0..1; asks to track what is in that box, printed as four integers 0–999.

    Raises:
        QueryError: the query is empty, too long, or holds control characters or the prompt's own markers.
    """
    text = check_query(tokenizer, spec.prompt, query)
    if first_box is None:
        form = spec.prompt.query
    else:
        numbers = np.clip(np.round(np.asarray(first_box, np.float64) * 999), 0, 999).astype(int)
        form = spec.prompt.track.replace("{box}", " ".join(map(str, numbers)))
    before, _, after = form.partition("{query}")
    return text_segment(tokenizer.encode(before + text + after), start_position)


def check_query(tokenizer: Tokenizer, spec: PromptSpec, query: str) -> str:
    """Return the query as it is asked: Unicode NFC, blanks collapsed, one closing full stop dropped.

    Raises:
        QueryError: see `query_segment`.
    """
    if not isinstance(query, str):
        raise QueryError(f"a query is a sentence, found {type(query).__name__}")
    if len(query) > spec.max_query_characters:
        raise QueryError(
            f"the query has {len(query):,} characters, more than the {spec.max_query_characters:,} that this model is "
            "asked with; name the target in a sentence"
        )
    try:
        query.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QueryError(f"the query is not valid Unicode text ({error.reason} at character {error.start})") from None
    text = " ".join(unicodedata.normalize("NFC", query).split()).removesuffix(".").rstrip()
    if not any(character.isalnum() or ord(character) > 0x2000 for character in text):
        raise QueryError(f'the query {query!r} is empty: it must name what to look for, such as "the red car"')
    bad = next((c for c in text if unicodedata.category(c) == "Cc"), None)
    if bad is not None:
        raise QueryError(f"the query holds the control character {bad!r}; it must be plain text")
    if "<|" in text:
        raise QueryError("the query holds '<|', which the prompt keeps for its own markers; leave it out")
    return text


def _single_id(tokenizer: Tokenizer, token: str) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise BundleError(
            f"tokenizer.json: {token!r} must be one token, found {len(ids)}; is it this model's tokenizer?"
        )
    return ids[0]
