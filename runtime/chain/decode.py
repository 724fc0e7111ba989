"""The decode loop: prefill of a video, prefill of its queries, one token at a time, and the bridging step.

It knows ids, positions and one language model session; nothing of videos, text or time. Letters: B rows (queries), L
new tokens of this call, K positions asked for, V rows of visual tokens, T taps, Q bridging queries, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import KVCache, Session, largest
from bridge_stg.runtime.chain.grammar import AnswerGrammar, AnswerState
from bridge_stg.runtime.chain.prompt import Segment, text_segment
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import EngineError

PREFILL_CHUNK = 1024
"""New tokens of one call at most while a video is prefilled; bounds the memory of its attention scores."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The part of the prompt that depends on the video alone, as it stands in a cache of one row.

    Attributes:
        cache: holds the keys and values of the first `length` positions.
        length: tokens in the cache.
        next_position: rotary position of the token that follows.
        no_visual_tokens: zeros [1+D, 2, H], what calls are fed whose tokens are all text.
    """

    cache: KVCache
    length: int
    next_position: int
    no_visual_tokens: np.ndarray


@dataclass(frozen=True, eq=False)
class Answer:
    """What the language model answered to one query.

    Attributes:
        ids: the answer's tokens.
        groups: the named groups (first, last); None if the target is absent.
        absent: probability of the answer `none` under the grammar, at the first choice.
        log_probability: log of the probability of the whole answer among all that the grammar allows.
        taps: [T, Q, H], the bridging queries' hidden states; None if the target is absent.
    """

    ids: list[int]
    groups: tuple[int, int] | None
    absent: float
    log_probability: float
    taps: Array | None


@dataclass(eq=False)
class Row:
    """One query on its way through the loop: what stands in its row of the cache, and what is still to be fed."""

    grammar: AnswerGrammar
    state: AnswerState
    length: int
    pending: Segment
    absent: float = 0.0
    log_probability: float = 0.0


def prefill_chunk(session: Session) -> int:
    """Return how many new tokens a session is fed in one call while a video is prefilled."""
    return min(getattr(session, "prefill_chunk", PREFILL_CHUNK), largest(session, "L"))


def prefill_video(
    session: Session,
    cache: KVCache,
    segment: Segment,
    visual_tokens: Array,
    *,
    report: Callable[[int, int], None],
    behind: int = 0,
) -> Prefix:
    """Run the video's part of the prompt, or what it has grown by, through the language model, in chunks.

    Args:
        cache: of one row, with room for the segment.
        segment: ids and positions of the video's part.
        visual_tokens: [1+D, V, H], row 0 of V all zero.
        report: called with the tokens done and their number; may raise to stop.
        behind: how many tokens of the video's part stand in the cache already. What is behind them in the cache, such
            as a query that was asked in it, is overwritten before any token sees it.
    """
    total = len(segment.input_ids)
    size = prefill_chunk(session)
    for start in range(0, total, size):
        report(start, total)
        chunk = part(segment, start, start + size)
        feed(session, cache, [chunk], [behind + start], outputs=1, visual_tokens=visual_tokens)
    report(total, total)
    # One zero row would do; but a dim of one is a special case to tracers and engine profiles.
    nothing = np.zeros((visual_tokens.shape[0], 2, visual_tokens.shape[2]), visual_tokens.dtype)
    return Prefix(cache=cache, length=behind + total, next_position=segment.next_position, no_visual_tokens=nothing)


def answer_queries(
    session: Session,
    cache: KVCache,
    prefix: Prefix,
    queries: Sequence[Segment],
    grammars: Sequence[AnswerGrammar],
    *,
    bridging_ids: Sequence[int],
    report: Callable[[int, int], None],
) -> list[Answer]:
    """Answer B queries on one video: copy its prefix, prefill the queries, decode, bridge.

    Every row takes its own way through its grammar. Tokens without an alternative are never asked for: they are fed
    with the next choice. A row that is done waits for the others.

    Args:
        cache: of B rows, with room for `positions_needed` tokens. One query may be asked in the prefix's own cache:
            its tokens go behind the prefix, which stays as it is.
        queries: the query segments: text only, their positions following the prefix.
        report: called with the rows done and their number before each call of the model; may raise to stop.
    """
    if cache is not prefix.cache:
        cache.copy_prefix(prefix.cache, prefix.length)
    rows = [start_row(prefix, query, grammar) for query, grammar in zip(queries, grammars, strict=True)]
    while any(not row.state.done for row in rows):
        report(sum(row.state.done for row in rows), len(rows))
        logits = decode_step(session, cache, prefix, rows)
        for row, row_logits in zip(rows, logits, strict=True):
            if not row.state.done:
                choose(row, row_logits)
    report(len(rows), len(rows))
    taps = bridge(session, cache, prefix, rows, bridging_ids)
    return [
        Answer(
            ids=list(row.state.ids),
            groups=row.state.span,
            absent=row.absent,
            log_probability=row.log_probability,
            taps=row_taps,
        )
        for row, row_taps in zip(rows, taps, strict=True)
    ]


def start_row(prefix: Prefix, query: Segment, grammar: AnswerGrammar) -> Row:
    """Return a row whose query is still to be fed, with what the answer begins with in any case."""
    row = Row(grammar=grammar, state=grammar.start(), length=prefix.length, pending=query)
    row.pending = append_ids(row.pending, row.state.forced())
    return row


def decode_step(session: Session, cache: KVCache, prefix: Prefix, rows: Sequence[Row]) -> np.ndarray:
    """Feed every open row what it has pending and return the logits [B, vocab] behind it.

    A row that is done is fed one spare token at its own position, to be overwritten by what it has pending itself.
    """
    fed = [part(row.pending, 0, 1) if row.state.done else row.pending for row in rows]
    lengths = [row.length for row in rows]
    outputs = feed(session, cache, fed, lengths, outputs=1, visual_tokens=prefix.no_visual_tokens)
    for row in rows:
        if not row.state.done:
            row.length += len(row.pending.input_ids)
            row.pending = text_segment([], row.pending.next_position)
    return outputs["logits"][:, 0]


def choose(row: Row, logits: np.ndarray) -> None:
    """Let a row take the likeliest of the tokens that its grammar allows, and what follows from it.

    Args:
        logits: [vocab], behind the row's last token.

    Raises:
        EngineError: a logit is not finite.
    """
    choices = row.state.choices()
    log_probabilities = _log_softmax(logits[choices])
    if row.state.is_first_choice:
        row.absent = float(np.exp(log_probabilities[choices == row.grammar.absent_id]).sum())
    best = int(log_probabilities.argmax())
    row.log_probability += float(log_probabilities[best])
    chosen = int(choices[best])
    row.state.choose(chosen)
    row.pending = append_ids(row.pending, [chosen, *row.state.forced()])


def bridge(
    session: Session, cache: KVCache, prefix: Prefix, rows: Sequence[Row], bridging_ids: Sequence[int]
) -> list[Array | None]:
    """Feed the rest of each answer and the bridging queries in one call; return each row's taps [T, Q, H].

    Rows that found nothing go along, and have no taps; if all did, nothing is fed.
    """
    if all(row.state.span is None for row in rows):
        return [None] * len(rows)
    fed = [append_ids(row.pending, bridging_ids) for row in rows]
    lengths = [row.length for row in rows]
    outputs = feed(session, cache, fed, lengths, outputs=len(bridging_ids), visual_tokens=prefix.no_visual_tokens)
    taps = outputs["taps"]  # [T, B, Q, H]
    return [None if row.state.span is None else taps[:, b] for b, row in enumerate(rows)]


def positions_needed(prefix_length: int, queries: Sequence[Segment], *, answer_tokens: int, bridging: int) -> int:
    """Return the cache positions that `answer_queries` may touch in any row.

    Rows are padded to the longest of a call, so a row near its end may be fed as many tokens as another has pending.
    """
    longest = max(len(query.input_ids) for query in queries)
    return prefix_length + longest + 2 * answer_tokens + bridging


def feed(
    session: Session,
    cache: KVCache,
    segments: Sequence[Segment],
    lengths: Sequence[int],
    *,
    outputs: int,
    visual_tokens: Array,
) -> dict[str, Any]:
    """Feed each row its segment behind `lengths[b]` cached tokens; ask for its last `outputs` positions.

    Rows are padded on the right by their last token. Padding is written behind the row's end, where no later token
    sees it before it is overwritten.
    """
    counts = np.array([len(segment.input_ids) for segment in segments])  # [B]
    longest = int(counts.max())
    feeds = {
        "input_ids": np.stack([_padded(segment.input_ids, longest) for segment in segments]),  # [B, L]
        "visual_index": np.stack([_padded(segment.visual_index, longest) for segment in segments]),  # [B, L]
        "visual_tokens": visual_tokens,  # [1+D, V, H]
        "positions": np.stack([_padded(segment.positions, longest) for segment in segments], axis=1),  # [3, B, L]
        "cache_position": np.array(lengths, np.int64),  # [B]
        "output_index": counts[:, None] - outputs + np.arange(outputs, dtype=np.int64)[None],  # [B, K]
    }
    return session.infer(feeds, cache=cache)


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    missing = length - values.shape[-1]
    return np.concatenate([values, np.repeat(values[..., -1:], missing, axis=-1)], axis=-1) if missing else values


def part(segment: Segment, start: int, stop: int) -> Segment:
    """Return tokens start … stop − 1 of a segment."""
    return Segment(
        input_ids=segment.input_ids[start:stop],
        visual_index=segment.visual_index[start:stop],
        positions=segment.positions[:, start:stop],
        next_position=segment.next_position,
    )


def append_ids(segment: Segment, ids: Sequence[int]) -> Segment:
    """Return the segment with text tokens behind it, their positions counting on."""
    tail = text_segment(ids, segment.next_position)
    return Segment(
        input_ids=np.concatenate([segment.input_ids, tail.input_ids]),
        visual_index=np.concatenate([segment.visual_index, tail.visual_index]),
        positions=np.concatenate([segment.positions, tail.positions], axis=1),
        next_position=tail.next_position,
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log probabilities in float64.

    Raises:
        EngineError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise EngineError(
            "language_model returned logits that are not finite; its precision does not suit this model or machine: "
            "choose another variant, and compare it with the bundle's golden cases"
        )
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
