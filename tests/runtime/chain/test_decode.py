from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime.backends import kv_pool
from bridge_stg.runtime.backends.kv_pool import BUCKET_POSITIONS, KVPool
from bridge_stg.runtime.backends.session import Preferences
from bridge_stg.runtime.chain.decode import Answer, Prefix, answer_queries, positions_needed, prefill_video
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import query_segment, time_strings, video_segment
from bridge_stg.runtime.errors import EngineError, Interrupted
from tests.errors import raises
from tests.fakes.chain import BRIDGING, TAPS, VOCAB, WIDTH, FakeLanguageModel, FakeTokenizer, fake_spec

SPEC = fake_spec()
TIMES = np.array([0.25, 1.25, 2.25, 10.25, 11.25])
QUERIES = ["a", "the red car", "the small green dog that runs", "the cat", "birds"]


def nothing(done: int, total: int) -> None:
    pass


class Loop:
    """A fake language model, the prefix of one video, and what a query needs."""

    def __init__(self, *, allow_none: bool = True, times: np.ndarray = TIMES) -> None:
        self.tokenizer: Any = FakeTokenizer()
        self.model = FakeLanguageModel(self.tokenizer)
        self.segment = video_segment(self.tokenizer, SPEC, times, (2, 3))
        self.visual = np.random.default_rng(1).random((2, 1 + 6 * len(times), WIDTH)).astype(np.float32)
        self.visual[:, 0] = 0
        self.grammar = AnswerGrammar(
            self.tokenizer, SPEC.prompt, time_strings(times, SPEC.prompt), allow_none=allow_none
        )

    def prefix(self) -> Prefix:
        cache = self.model.allocate_cache(batch=1, capacity=len(self.segment))
        return prefill_video(self.model, cache, self.segment, self.visual, report=nothing)  # type: ignore[arg-type]

    def answer(self, queries: list[str], *, stale: int = 0, report: Any = nothing) -> list[Answer]:
        prefix = self.prefix()
        segments = [query_segment(self.tokenizer, SPEC, query, prefix.next_position) for query in queries]
        longest = max(map(len, self.grammar.time_ids))
        positions = positions_needed(prefix.length, segments, answer_tokens=2 * longest + 4, bridging=BRIDGING)
        cache = self.model.allocate_cache(batch=len(queries), capacity=positions)
        cache.entries[:] = stale
        return answer_queries(
            self.model,  # type: ignore[arg-type]
            cache,  # type: ignore[arg-type]
            prefix,
            segments,
            self.grammar,
            bridging_ids=SPEC.language.bridging_ids,
            report=report,
        )


def same(a: Answer, b: Answer) -> None:
    assert (a.ids, a.groups) == (b.ids, b.groups)
    assert (a.absent, a.log_probability) == (b.absent, b.log_probability)
    assert (a.taps is None) == (b.taps is None)
    if a.taps is not None and b.taps is not None:
        np.testing.assert_array_equal(a.taps, b.taps)


def test_the_model_sees_prompt_answer_and_bridging_queries() -> None:
    loop = Loop(allow_none=False)
    (answer,) = loop.answer(["the red car"])
    prompt = "".join(
        f"<{time} seconds><|vision_start|>{'<|video_pad|>' * 6}<|vision_end|>" for time in (0.2, 1.2, 2.2, 10.2, 11.2)
    )
    answer_text = loop.tokenizer.decode(answer.ids)
    bridging = "".join(f"[{VOCAB + i}]" for i in range(BRIDGING))
    assert loop.model.seen[-1] == [
        f"<|im_start|>user\n{prompt}Find the red car.<|im_end|>\n<|im_start|>assistant\n{answer_text}{bridging}"
    ]
    assert answer.groups is not None and answer.taps is not None
    first, last = answer.groups
    times = time_strings(TIMES, SPEC.prompt)
    assert answer_text == f"{times[first]} to {times[last]}" and first <= last
    assert answer.taps.shape == (TAPS, BRIDGING, WIDTH)
    assert answer.absent == 0


def test_positions_are_consecutive_through_the_whole_sequence() -> None:
    loop = Loop(allow_none=False)
    (answer,) = loop.answer(["the red car"])
    entries = loop.model.allocated[-1].entries[0]
    query = query_segment(loop.tokenizer, SPEC, "the red car", loop.segment.next_position)
    total = len(loop.segment) + len(query) + len(answer.ids) + BRIDGING
    after = np.arange(total - len(loop.segment)) + loop.segment.next_position
    np.testing.assert_array_equal(entries[len(loop.segment) : total, 2:], after[:, None].repeat(3, 1))
    np.testing.assert_array_equal(entries[: len(loop.segment), 2:], loop.segment.positions.T)


def test_a_batch_gives_what_each_query_gives_alone() -> None:
    loop = Loop()
    loop.model.script = {
        "a": "none",
        "birds": "<10.2 seconds> to <11.2 seconds>",
        "the cat": "<0.2 seconds> to <2.2 seconds>",
    }
    together = loop.answer(QUERIES)
    for query, answer in zip(QUERIES, together):
        same(answer, loop.answer([query])[0])
    assert together[0].groups is None and together[0].taps is None
    assert together[3].groups == (0, 2) and together[4].groups == (3, 4)
    assert len({tuple(answer.ids) for answer in together}) > 2


def test_stale_cache_entries_do_not_matter() -> None:
    same(Loop().answer(["birds", "the red car"])[0], Loop().answer(["birds", "the red car"], stale=77)[0])


def test_prefill_in_chunks_gives_the_same_cache() -> None:
    whole, chunked = Loop(), Loop()
    whole.prefix()
    chunked.model.preferences = Preferences(prefill_chunk=7)
    reports: list[tuple[int, int]] = []
    cache = chunked.model.allocate_cache(batch=1, capacity=len(chunked.segment))
    prefill_video(
        chunked.model,  # type: ignore[arg-type]
        cache,  # type: ignore[arg-type]
        chunked.segment,
        chunked.visual,
        report=lambda *values: reports.append(values),
    )
    np.testing.assert_array_equal(cache.entries, whole.model.allocated[0].entries)
    assert len(chunked.model.calls) == -(-len(chunked.segment) // 7)
    assert reports[0] == (0, len(chunked.segment)) and reports[-1] == (len(chunked.segment),) * 2


def test_a_session_may_prefer_a_chunk_size() -> None:
    loop = Loop()
    loop.model.preferences = Preferences(prefill_chunk=5)
    loop.prefix()
    assert len(loop.model.calls) == -(-len(loop.segment) // 5)


def test_tokens_without_an_alternative_are_not_decoded() -> None:
    loop = Loop(allow_none=False, times=np.array([0.25]))
    (answer,) = loop.answer(["the only frame"])
    assert answer.groups == (0, 0) and answer.log_probability == 0
    assert len(loop.model.calls) == 2  # prefix; query, answer and bridging queries at once
    several = Loop()
    (answer,) = several.answer(["the red car"])
    assert len(several.model.calls) < 2 + len(answer.ids) / 2


def test_a_batch_of_absent_targets_has_no_bridging_step() -> None:
    loop = Loop()
    loop.model.script = {"a": "none", "birds": "none"}
    answers = loop.answer(["a", "birds"])
    assert all(answer.groups is None and answer.absent > 0.999 for answer in answers)
    assert all((call["input_ids"] < VOCAB).all() for call in loop.model.calls)


def test_scores_are_probabilities_under_the_grammar() -> None:
    loop = Loop()
    logits = {}
    run = loop.model.run

    def flat(feeds: Any, cache: Any) -> Any:
        outputs = run(feeds, cache)
        outputs["logits"][:] = np.random.default_rng(5).normal(size=VOCAB)
        outputs["logits"][..., ord("x")] = 1e4  # not allowed, so it must not count
        logits["last"] = outputs["logits"][0, 0]
        return outputs

    loop.model.run = flat  # type: ignore[method-assign]
    (answer,) = loop.answer(["the red car"])
    none, time = np.exp(logits["last"][[ord("n"), ord("<")]].astype(np.float64))
    assert answer.absent == pytest.approx(none / (none + time))
    assert answer.log_probability <= np.log(max(none, time) / (none + time)) + 1e-12


def test_logits_that_are_not_finite_are_an_engine_error() -> None:
    loop = Loop()
    run = loop.model.run

    def broken(feeds: Any, cache: Any) -> Any:
        outputs = run(feeds, cache)
        outputs["logits"][..., ord("<")] = np.nan
        return outputs

    loop.model.run = broken  # type: ignore[method-assign]
    with raises("engine.not_finite", "language_model", kind=EngineError):
        loop.answer(["the red car"])


def test_the_loop_can_be_stopped_at_every_step() -> None:
    loop = Loop()
    reports: list[tuple[int, int]] = []

    def stop_at_third(done: int, total: int) -> None:
        reports.append((done, total))
        if len(reports) == 3:
            raise Interrupted("call.cancelled", "stopped")

    with pytest.raises(Interrupted):
        loop.answer(["the red car", "birds"], report=stop_at_third)
    assert len(loop.model.calls) == 1 + 2


@pytest.mark.parametrize("most", [3, 7, 16])
def test_queries_longer_than_the_largest_call_have_the_same_answers(most: int) -> None:
    queries = ["the red car", "birds", "a man in a long grey coat who walks to the left"]
    expected, short = Loop(), Loop()
    short.model.graph = dataclasses.replace(short.model.graph, ranges={"L": (1, most)})
    for ours, theirs in zip(short.answer(queries), expected.answer(queries), strict=True):
        same(ours, theirs)
    assert max(call["input_ids"].shape[1] for call in short.model.calls) == most


def test_the_budget_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeLanguageModel(FakeTokenizer())
    pool, row = KVPool(model), BUCKET_POSITIONS * 40
    cache = pool.take(batch=1, positions=1)
    model.device = SimpleNamespace(free_bytes=6 * row)
    assert pool.rows(cache, positions=1) == 3
    pool.give(cache)
    assert pool.rows(cache, positions=1) == 3  # (6 + 1) / 2
    model.device = None
    monkeypatch.setattr(kv_pool, "available_bytes", lambda: 4 * row)
    assert pool.rows(cache, positions=1) == 2


def test_the_pool_buckets_and_reuses_caches() -> None:
    model = FakeLanguageModel(FakeTokenizer())
    pool = KVPool(model, budget_bytes=4 * BUCKET_POSITIONS * 40)
    first = pool.take(batch=1, positions=3)
    assert (first.batch, first.capacity) == (1, BUCKET_POSITIONS)
    pool.give(first)
    assert pool.take(batch=2, positions=3) is not first
    assert pool.take(batch=1, positions=BUCKET_POSITIONS) is first
    assert pool.take(batch=1, positions=BUCKET_POSITIONS + 1).capacity == 2 * BUCKET_POSITIONS
    assert pool.rows(first, positions=BUCKET_POSITIONS) == 4
    assert pool.rows(first, positions=BUCKET_POSITIONS + 1) == 2
    assert pool.rows(first, positions=100 * BUCKET_POSITIONS) == 1


def test_the_pool_keeps_no_more_than_its_budget() -> None:
    model = FakeLanguageModel(FakeTokenizer())
    pool = KVPool(model, budget_bytes=2 * BUCKET_POSITIONS * 40)
    caches = [pool.take(batch=1, positions=1) for _ in range(3)]
    for cache in caches:
        pool.give(cache)
    again = [pool.take(batch=1, positions=1) for _ in range(3)]
    assert caches[0] not in again and caches[1] in again and caches[2] in again
    pool.give(again[0])
    pool.clear()
    assert pool.take(batch=1, positions=1) is not again[0]
