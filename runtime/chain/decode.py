"""The decode loop: prefill of a video, prefill of its queries, one token at a time, and the bridging step.

Knows ids, positions and one language model session; nothing of videos, text or time. Letters: B rows (queries), L new
tokens per row, K output positions per row, V rows of visual tokens, T taps, Q bridging queries, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import KVCache, Session, check_finite, largest, smallest
from bridge_stg.runtime.chain.grammar import AnswerGrammar, AnswerState
from bridge_stg.runtime.chain.prompt import Segment, text_segment
from bridge_stg.runtime.device.array_ops import Array


@dataclass(frozen=True, eq=False)
class Prefix:
    """The part of the prompt that depends on the video alone, prefilled in a cache of one row.

    Attributes:
        cache: contains the keys and values of the first `length` positions.
        length: tokens in the cache.
        next_position: rotary position of the text that follows.
        last_position: largest rotary position in the cache; more than `next_position` in a long video without printed
            times, whose tokens count the time.
        input_ids: int64, ids of the last prefilled part.
        no_visual_tokens: zeros [1+D, 2, H], the visual tokens of calls whose tokens are all text.
    """

    cache: KVCache
    length: int
    next_position: int
    last_position: int
    input_ids: np.ndarray
    no_visual_tokens: np.ndarray


@dataclass(frozen=True, eq=False)
class Answer:
    """The language model's answer to one query.

    Attributes:
        ids: the answer's tokens.
        groups: the named groups (first, last); None if the target is absent.
        absent: probability of the answer `none` under the grammar, at the first choice.
        log_probability: log probability of the whole answer among all that the grammar allows.
        taps: [T, Q, H], the bridging queries' hidden states; None if the target is absent.
    """

    ids: list[int]
    groups: tuple[int, int] | None
    absent: float
    log_probability: float
    taps: Array | None


@dataclass(eq=False)
class Row:
    """One query in the decode loop: the tokens in its row of the cache, and those to feed next."""

    grammar: AnswerGrammar
    state: AnswerState
    length: int
    pending: Segment
    absent: float = 0.0
    log_probability: float = 0.0


def prefill_chunk(session: Session) -> int:
    """Return how many new tokens a session is fed per call while a video is prefilled."""
    return min(session.preferences.prefill_chunk, largest(session, "L"))


def prefill_video(
    session: Session,
    cache: KVCache,
    segment: Segment,
    visual_tokens: Array,
    *,
    report: Callable[[int, int], None],
    cached: int = 0,
) -> Prefix:
    """Run the video's part of the prompt, or what was added to it, through the language model, in chunks.

    `cache` has one row and room for the segment, `visual_tokens` [1+D, V, H] has a row 0 of zeros, and `report` is
    called with the tokens done and their total; it may raise to stop. `cached` tokens of the video's part are in the
    cache already. What follows them there, such as an earlier query, is overwritten before any token attends to it.
    """
    total = len(segment)
    size, outputs = prefill_chunk(session), smallest(session, "K")
    for start in range(0, total, size):
        report(start, total)
        chunk = segment.part(start, start + size)
        feed(session, cache, [chunk], [cached + start], outputs=outputs, visual_tokens=visual_tokens)
    report(total, total)
    # One zero row would do; but a dim of one is a special case to tracers and engine profiles.
    no_visual_tokens = np.zeros((visual_tokens.shape[0], 2, visual_tokens.shape[2]), visual_tokens.dtype)
    last_position = int(segment.positions.max())
    return Prefix(cache, cached + total, segment.next_position, last_position, segment.input_ids, no_visual_tokens)


def answer_queries(
    session: Session,
    cache: KVCache,
    prefix: Prefix,
    queries: Sequence[Segment],
    grammar: AnswerGrammar,
    *,
    bridging_ids: Sequence[int],
    report: Callable[[int, int], None],
) -> list[Answer]:
    """Answer B queries on one video: copy its prefix, prefill the queries, decode, bridge.

    Tokens without an alternative are not decoded: they are fed together with the next choice. A row that is done waits
    for the others.

    `cache` has B rows and room for `positions_needed` tokens. A single query may use the prefix's own cache: its tokens
    follow the prefix, which stays unchanged. `queries` are text whose positions follow the prefix. `report` is called
    with the rows done and their total before each call of the model, and may raise to stop.
    """
    if cache is not prefix.cache:
        cache.copy_prefix(prefix.cache, prefix.length)
    rows = []
    for query in queries:
        state = grammar.start()
        rows.append(Row(grammar, state, prefix.length, query.followed_by(state.forced())))
    while any(not row.state.done for row in rows):
        report(sum(row.state.done for row in rows), len(rows))
        logits = decode_step(session, cache, prefix, rows)
        for row, row_logits in zip(rows, logits, strict=True):
            if not row.state.done:
                choose(row, row_logits)
    report(len(rows), len(rows))
    taps = bridge(session, cache, prefix, rows, bridging_ids)
    return [
        Answer(list(row.state.ids), row.state.span, row.absent, row.log_probability, row_taps)
        for row, row_taps in zip(rows, taps, strict=True)
    ]


def decode_step(session: Session, cache: KVCache, prefix: Prefix, rows: Sequence[Row]) -> np.ndarray:
    """Feed every open row its pending tokens and return the logits [B, vocab] after the last of them.

    A row that is done is fed one token at its own position, which its pending tokens overwrite later.
    """
    fed = [row.pending.part(0, 1) if row.state.done else row.pending for row in rows]
    outputs = feed(session, cache, fed, [row.length for row in rows], outputs=1, visual_tokens=prefix.no_visual_tokens)
    for row in rows:
        if not row.state.done:
            row.length += len(row.pending)
            row.pending = text_segment([], row.pending.next_position)
    logits: np.ndarray = outputs["logits"][:, 0]
    return logits


def choose(row: Row, logits: np.ndarray) -> None:
    """Append the most probable token that the row's grammar allows, by the logits [vocab], and forced tokens.

    Raises EngineError if a logit is not finite.
    """
    choices = row.state.choices()
    check_finite("language_model", logits=logits[choices])
    shifted = logits[choices].astype(np.float64) - logits[choices].max()
    log_probabilities = shifted - np.log(np.exp(shifted).sum())
    if not row.state.ids:  # the choice between `none` and the times
        row.absent = float(np.exp(log_probabilities[choices == row.grammar.none_ids[0]]).sum())
    best = int(log_probabilities.argmax())
    row.log_probability += float(log_probabilities[best])
    chosen = int(choices[best])
    row.state.choose(chosen)
    row.pending = row.pending.followed_by([chosen, *row.state.forced()])


def bridge(
    session: Session, cache: KVCache, prefix: Prefix, rows: Sequence[Row], bridging_ids: Sequence[int]
) -> list[Array | None]:
    """Feed the rest of each answer and the bridging queries in one call; return each row's taps [T, Q, H].

    The taps of rows whose target is absent are None; if all are, nothing is fed.
    """
    if all(row.state.span is None for row in rows):
        return [None] * len(rows)
    fed = [row.pending.followed_by(bridging_ids) for row in rows]
    lengths = [row.length for row in rows]
    outputs = feed(session, cache, fed, lengths, outputs=len(bridging_ids), visual_tokens=prefix.no_visual_tokens)
    taps = outputs["taps"]  # [T, B, Q, H]
    return [None if row.state.span is None else taps[:, b] for b, row in enumerate(rows)]


def positions_needed(prefix_length: int, queries: Sequence[Segment], *, answer_tokens: int, bridging: int) -> int:
    """Return how many cache positions `answer_queries` may write in any row.

    Rows are padded to the longest of a call, so a row near its end may be fed as many tokens as another has pending.
    """
    return prefix_length + max(map(len, queries)) + 2 * answer_tokens + bridging


def feed(
    session: Session,
    cache: KVCache,
    segments: Sequence[Segment],
    lengths: Sequence[int],
    *,
    outputs: int,
    visual_tokens: Array,
) -> dict[str, Any]:
    """Feed each row its segment after `lengths[b]` cached tokens; return outputs of its last `outputs` positions.

    In a row with fewer tokens, the output of the first repeats. Rows are padded on the right by their last token. The
    padding lies past the row's end, where it is overwritten before a later token attends to it.

    Rows that are longer than the session's largest call are fed in several calls. In the calls before the last, a
    shorter row is fed its first token, which the last call overwrites with the same values.
    """
    size, unread = largest(session, "L"), smallest(session, "K")
    while max(map(len, segments)) > size:
        counts = [min(size, max(1, len(segment) - size)) for segment in segments]
        first = [segment.part(0, count) for segment, count in zip(segments, counts, strict=True)]
        session.infer(_feeds(first, lengths, outputs=unread, visual_tokens=visual_tokens), cache=cache)
        done = [count if len(segment) > size else 0 for segment, count in zip(segments, counts, strict=True)]
        segments = [segment.part(count, len(segment)) for segment, count in zip(segments, done, strict=True)]
        lengths = [length + count for length, count in zip(lengths, done, strict=True)]
    return session.infer(_feeds(segments, lengths, outputs=outputs, visual_tokens=visual_tokens), cache=cache)


def _feeds(
    segments: Sequence[Segment], lengths: Sequence[int], *, outputs: int, visual_tokens: Array
) -> dict[str, Any]:
    """Return the inputs of the language model for one call."""
    counts = np.array([len(segment) for segment in segments])  # [B]
    longest = int(counts.max())
    return {
        "input_ids": np.stack([_padded(segment.input_ids, longest) for segment in segments]),  # [B, L]
        "visual_index": np.stack([_padded(segment.visual_index, longest) for segment in segments]),  # [B, L]
        "visual_tokens": visual_tokens,  # [1+D, V, H]
        "positions": np.stack([_padded(segment.positions, longest) for segment in segments], axis=1),  # [3, B, L]
        "cache_position": np.array(lengths, np.int64),  # [B]
        "output_index": (counts[:, None] - outputs + np.arange(outputs, dtype=np.int64)[None]).clip(min=0),  # [B, K]
    }


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    missing = length - values.shape[-1]
    return np.concatenate([values, np.repeat(values[..., -1:], missing, axis=-1)], axis=-1) if missing else values
