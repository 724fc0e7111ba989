"""The text head: the language model writes spans and boxes as JSON, and answers questions.

A tube is found in one of two modes: `joint` requests all boxes of the video in one answer; `two-step` requests the
span, then the box in single frames of the span, several at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.backends.session import largest
from bridge_stg.runtime.bundle.spec import TextSpec
from bridge_stg.runtime.chain.decode import prefill_chunk
from bridge_stg.runtime.chain.opened_video import Chain, ChatMessage, TextStream, VideoParts, prompts_of
from bridge_stg.runtime.chain.positions import VisualGrid
from bridge_stg.runtime.chain.prompt import (
    Segment,
    check_query,
    join_segments,
    query_too_long,
    text_segment,
    time_numbers,
    visual_segment,
)
from bridge_stg.runtime.chain.results import Grounding, Tube
from bridge_stg.runtime.chain.spans import Span, fine_frames, in_span
from bridge_stg.runtime.chain.tasks import Task
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import QueryError
from bridge_stg.runtime.heads.answers import Box, nearest_index, read_boxes, read_span
from bridge_stg.runtime.heads.chat import AnswerStream, check_chat, text_after_video
from bridge_stg.runtime.heads.drafts import draft
from bridge_stg.runtime.heads.generate import GreedyDecoding, TextRow, decode_answers, prefill
from bridge_stg.runtime.heads.json_grammar import ConstrainedDecoding, JsonForm, JsonGrammar, json_label
from bridge_stg.runtime.heads.options import TextOptions
from bridge_stg.runtime.host.limits import Limits

COUNTS = ("calls", "tokens", "forced", "drafted", "accepted", "truncated")
"""Keys of `Grounding.decoding`."""
JOINT_GROUPS = 32
"""Maximum groups of frames of a video for which the mode `auto` is `joint`."""
STEP_FRAMES = 16
"""Maximum frames of a span in whose second step a box is requested; boxes between them are interpolated."""
STEP_ROWS = 8
"""Maximum frames of one batch of the second step; bounds the memory of visual tokens and KV cache."""


@dataclass(frozen=True, eq=False)
class TextAnswer:
    """A complete answer; see `Grounding.decoding` for its counts.

    Attributes:
        text: the answer without the tokens that ended it.
        absent: probability of the answer that the target is absent.
        score: geometric mean of the probabilities of the tokens that were chosen by logits.
        counts: values of `COUNTS`.
    """

    text: str
    absent: float
    score: float
    counts: Counter[str]


class TextHead:
    """Answers queries and questions on one video with text.

    Args:
        chain: what all videos share; its spec has the section `text`.
        parts: the video. If the chain's heads are text, the prefix of an image is the family's prompt of an image.
        options: mode, grammar, drafts and length of answers.
        grammar: makes the matchers of the chain's tokenizer.
    """

    def __init__(self, chain: Chain, parts: VideoParts, options: TextOptions, grammar: JsonGrammar) -> None:
        assert chain.spec.text is not None
        self._chain, self._options, self._grammar = chain, options, grammar
        self._text: TextSpec = chain.spec.text
        self._video, self._prefix, self._features = parts.facts, parts.prefix, parts.features
        self._group_times = parts.facts.sample_times.mean(axis=1)
        self._times = tuple(time_numbers(self._group_times, chain.spec.prompt))  # as text
        self._printed_times = np.array(self._times, np.float64)
        has_image_prompt = parts.facts.is_image and chain.heads == "text"
        self._turn = self._text.image_turn if has_image_prompt else self._text.video_turn

    def ground(self, queries: Sequence[str], task: Task, limits: Limits) -> list[Grounding]:
        """Ground queries; see `Head.ground`."""
        if task.first_box is not None:
            message = "tracking needs bridge heads, but text heads answer here; ground a query instead"
            raise QueryError("query.needs_bridge_heads", message)
        mode = self._mode(task)
        message = {"image": self._text.image, "joint": self._text.tube}.get(mode, self._text.span)
        prompts = prompts_of(queries, lambda query: self._prompt(self._turn_text(self._turn, message, query)))
        if mode in ("image", "joint"):
            times, size = self._times if mode == "joint" else (), self._video.choice.size
            forms = [self._boxes_form(query, times, size, allow_none=task.allow_none) for query in queries]
        else:
            forms = [JsonForm(self._text, self._times, allow_none=task.allow_none)] * len(queries)
        with limits.stage("answer"):
            answers = self._answers(prompts, forms, limits)
        return [
            dataclasses.replace(self._result(mode, query, form, answer, limits), task=task.name, mode=mode)
            for query, form, answer in zip(queries, forms, answers, strict=True)
        ]

    def ask(self, question: str, *, history: Sequence[ChatMessage], max_tokens: int, limits: Limits) -> TextStream:
        """Answer a question; see `Head.ask`."""
        check_chat(self._chain.spec, question, history=history, max_tokens=max_tokens)
        prompt = self._prompt(text_after_video(self._text, self._turn, history, question))
        decoding = self._free_decoding(prompt, max_tokens=self._room(prompt, max_tokens, margin=2))
        row = TextRow(decoding, self._prefix.length, prompt)

        def steps() -> Iterator[None]:
            with limits.stage("answer"):
                for _ in self._decode([row], limits, margin=2):
                    limits.report(len(decoding.ids), None)
                    yield

        return AnswerStream(
            self._chain.tokenizer, decoding, steps(), self._text.stop_ids, self._prefix.length + len(prompt)
        )

    def _mode(self, task: Task) -> str:
        """Return the mode of a task; see `Grounding.mode`."""
        if self._video.is_image:
            return "image"
        if task.name == "span":
            return "span"
        if self._options.mode != "auto":
            return self._options.mode
        return "joint" if len(self._times) <= JOINT_GROUPS else "two-step"

    # The prompts and the forms of their answers.

    def _turn_text(self, turn: str, form: str, query: str) -> str:
        """Return the text after visual tokens; `turn` and `form`, with `{query}`, are two of those of `TextSpec`."""
        before, _, after = form.partition("{query}")
        message = before + check_query(self._chain.spec.prompt, query) + after
        return text_after_video(self._text, turn, (), message)

    def _prompt(self, text: str) -> Segment:
        """Return a text as the prompt after the prefix.

        The answer's positions follow all others, also those of visual tokens.
        """
        segment = text_segment(self._chain.tokenizer.encode(text), self._prefix.next_position)
        answer_position = max(self._prefix.last_position + 1, segment.next_position)
        return dataclasses.replace(segment, next_position=answer_position)

    def _boxes_form(self, query: str, times: tuple[str, ...], size: tuple[int, int], *, allow_none: bool) -> JsonForm:
        """Return the form of a list of boxes in frames of `size` (width, height in pixels, as the model sees them)."""
        scale = (self._text.box_scale,) * 2 if self._text.box_scale else size
        tokenizer = self._chain.tokenizer
        shown = tokenizer.decode(tokenizer.encode(check_query(self._chain.spec.prompt, query)))
        label = json_label(shown)  # as the tokenizer can write it, such as in lower case
        return JsonForm(self._text, times, scale=(scale[0], scale[1]), label=label, allow_none=allow_none)

    # The answers.

    def _free_decoding(self, prompt: Segment, *, max_tokens: int, absent: str | None = None) -> GreedyDecoding:
        """Return the state of an answer without a grammar; `absent` is the answer that the target is absent."""
        penalty = self._text.repetition_penalty
        seen = np.concatenate([self._prefix.input_ids, prompt.input_ids]) if penalty != 1 else ()
        absent_ids = self._chain.tokenizer.encode(absent) if absent else ()
        stop_ids = self._text.stop_ids
        return GreedyDecoding(
            max_tokens=max_tokens, stop_ids=stop_ids, penalty=penalty, prompt_ids=seen, absent_ids=absent_ids
        )

    def _row(self, prompt: Segment, form: JsonForm, *, length: int, max_tokens: int) -> TextRow:
        """Return the row of a new answer to a prompt that follows `length` cached tokens."""
        if self._options.grammar:
            decoding: GreedyDecoding = ConstrainedDecoding(self._grammar, form, max_tokens=max_tokens)
        else:
            absent = form.absent if form.allow_none else None
            decoding = self._free_decoding(prompt, max_tokens=max_tokens, absent=absent)
        tokenizer = self._chain.tokenizer

        def draft_ids(ids: Sequence[int]) -> list[int]:
            return tokenizer.encode(draft(form, tokenizer.decode(ids)))

        is_list = bool(form.times and form.label)  # other answers have one entry
        return TextRow(decoding, length, prompt, draft_ids if is_list and self._options.drafts else None)

    def _entry_tokens(self, form: JsonForm) -> int:
        """Return the maximum tokens of one entry of a list."""
        label = (form.label or "").replace("<", "< ")  # under a grammar, added tokens such as `<think>` are spelled out
        longest = "0" * max(map(len, (*form.times, "")))
        text = f'{{"time": {longest}, "bbox_2d": [, , , ], "label": {label}}},\n\t'
        return 8 + 4 * max(4, len(str(max(form.scale)))) + len(self._chain.tokenizer.encode(text))

    def _room(self, prompt: Segment, max_tokens: int, *, margin: int) -> int:
        """Return the maximum tokens of an answer, `max_tokens` or fewer; `margin` positions of the cache stay free.

        Raises QueryError if the model has no position left for an answer.
        """
        most = self._chain.spec.language.max_positions
        capacity = largest(self._chain.language_model, "S")
        room = min(most - prompt.next_position, capacity - self._prefix.length - len(prompt) - margin)
        if room < 1:
            raise query_too_long(prompt.next_position, most)
        return min(room, max_tokens)

    def _answers(self, prompts: Sequence[Segment], forms: Sequence[JsonForm], limits: Limits) -> list[TextAnswer]:
        """Return the answers to prompts that follow the prefix, in batches whose caches fit the budget."""
        answers: list[TextAnswer] = []
        entry = max(map(self._entry_tokens, forms), default=0)
        margin = 3 * entry  # a row is padded to the longest of a call: forced tokens (1 entry) and a draft (2)
        longest = (len(self._times) + 1) * entry if self._options.grammar else self._options.max_tokens
        most = min(self._options.max_tokens, longest)
        while len(answers) < len(prompts):
            rest = range(len(answers), len(prompts))
            positions = self._prefix.length + max(len(prompts[i]) for i in rest) + most + margin
            batch = rest[: self._chain.pool.rows(self._prefix.cache, positions=positions)]
            rows = []
            for i in batch:
                room = self._room(prompts[i], most, margin=margin)
                rows.append(self._row(prompts[i], forms[i], length=self._prefix.length, max_tokens=room))
            for _ in self._decode(rows, limits, margin=margin):
                limits.report(sum(len(row.decoding.ids) for row in rows), None)
            answers += [self._text_answer(row) for row in rows]
        return answers

    def _decode(self, rows: Sequence[TextRow], limits: Limits, *, margin: int) -> Iterator[int]:
        """Decode the answers of rows that follow the prefix; yield the number of calls after each call of the model.

        Prompts that are longer than one call of the prefill, such as those of long chats, are prefilled in chunks.
        """
        chain, prefix = self._chain, self._prefix
        most = max(len(row.pending) + row.decoding.max_tokens for row in rows)
        cache = chain.pool.take(batch=len(rows), positions=prefix.length + most + margin)
        if cache is not prefix.cache:
            cache.copy_prefix(prefix.cache, prefix.length)
        prompts, chunk = [row.pending for row in rows], prefill_chunk(chain.language_model)
        if max(map(len, prompts)) > chunk:
            last = prefill(
                chain.language_model, cache, prompts, prefix.no_visual_tokens, chunk=chunk, cached=prefix.length,
                report=lambda: limits.report(0, None),
            )  # fmt: skip
            for row, prompt, pending in zip(rows, prompts, last, strict=True):
                row.length, row.pending = row.length + len(prompt) - 1, pending
        yield from decode_answers(chain.language_model, cache, rows, prefix.no_visual_tokens)
        chain.pool.give(cache)  # not after a failed call, which leaves the cache in an unknown state

    def _text_answer(self, row: TextRow) -> TextAnswer:
        """Return the complete answer of a row, without the ids that ended it."""
        decoding, stop_ids = row.decoding, self._text.stop_ids
        counts = row.counts + Counter(tokens=len(decoding.ids), truncated=int(decoding.truncated))
        text = self._chain.tokenizer.decode([i for i in decoding.ids if i not in stop_ids])
        score = math.exp(decoding.log_probability / max(decoding.choices, 1))
        return TextAnswer(text, decoding.absent, score, counts)

    # From answers to results.

    def _result(self, mode: str, query: str, form: JsonForm, answer: TextAnswer, limits: Limits) -> Grounding:
        """Return the result of an answer; in the mode `two-step`, after the second step."""
        if mode == "image":
            return self._of_image(query, form, answer)
        if mode == "joint":
            return self._of_list(query, form, answer)
        span = self._named_span(answer)
        if span is None or mode == "span":
            return self._grounding(query, answer, span=span, tube=None)
        return self._of_frames(query, answer, span, limits, allow_none=form.allow_none)

    def _of_image(self, query: str, form: JsonForm, answer: TextAnswer) -> Grounding:
        """Return the result of an answer that has one box."""
        boxes = [box for _, box in read_boxes(answer.text, form.scale)[:1]]
        span = (0.0, self._video.duration_s) if boxes else None
        tube = self._tube(np.zeros(1), boxes, form.scale) if boxes else None
        return self._grounding(query, answer, span=span, tube=tube)

    def _of_list(self, query: str, form: JsonForm, answer: TextAnswer) -> Grounding:
        """Return the result of an answer that lists times and boxes; of equal times, the first one counts."""
        found: dict[int, Box] = {}
        for time_s, box in read_boxes(answer.text, form.scale):
            if time_s is not None:
                found.setdefault(self._group_at(time_s), box)
        if not found:
            return self._grounding(query, answer, span=None, tube=None)
        groups = sorted(found)
        tube = self._tube(self._group_times[groups], [found[group] for group in groups], form.scale)
        return self._grounding(query, answer, span=self._video.span_of((groups[0], groups[-1])), tube=tube)

    def _named_span(self, answer: TextAnswer) -> Span | None:
        """Return the span that an answer names, from the first to the last group; None if the target is absent."""
        times = read_span(answer.text)
        return None if times is None else self._video.span_of((self._group_at(times[0]), self._group_at(times[1])))

    def _group_at(self, time_s: float) -> int:
        """Return the index of the group whose time in the prompt is nearest."""
        return nearest_index(time_s, self._printed_times)

    def _of_frames(self, query: str, answer: TextAnswer, span: Span, limits: Limits, *, allow_none: bool) -> Grounding:
        """Request the box in single frames of a span, and return the result; `answer` named the span."""
        frames = fine_frames(
            span, self._video.fine_grid, fine_fps=self._chain.spec.frames.fine_fps, margin_s=0.0,
            max_frames=min(STEP_FRAMES, self._chain.spec.frames.max_fine_frames),
        )  # fmt: skip
        form = self._boxes_form(query, (), self._video.fine_size(self._chain.spec), allow_none=allow_none)
        prompt, answer_tokens = self._frame_prompt(query), 2 * self._entry_tokens(form)
        positions = len(prompt) + 2 * answer_tokens  # as many for padding as for the answer
        most = min(STEP_ROWS, self._chain.pool.rows(self._prefix.cache, positions=positions))
        boxes: dict[float, Box] = {}
        counts = Counter(answer.counts)
        for start in range(0, len(frames.indices), most):
            tokens, shown = self._features.at(frames.indices[start : start + most], limits)  # [F, 1+D, n, H]
            with limits.stage("boxes"):
                answers, calls = self._answers_in_frames(tokens, prompt, form, limits, answer_tokens=answer_tokens)
            for time_s, frame_answer in zip(shown, answers, strict=True):
                counts += Counter({**frame_answer.counts, "calls": 0})  # rows of a batch share its calls
                for _, box in read_boxes(frame_answer.text, form.scale)[:1]:
                    boxes.setdefault(float(time_s), box)
            counts["calls"] += calls
        answer = dataclasses.replace(answer, counts=counts)
        if not boxes:
            return self._grounding(query, answer, span=None, tube=None, frames=len(frames.indices))
        tube = self._tube(np.array(sorted(boxes)), [boxes[time] for time in sorted(boxes)], form.scale)
        return self._grounding(query, answer, span=span, tube=tube, frames=len(frames.indices))

    def _frame_prompt(self, query: str) -> Segment:
        """Return the family's prompt that requests a box in one fine frame; its visual tokens are rows 1 to n."""
        chain, spec = self._chain, self._chain.spec
        width, height = self._video.fine_size(spec)
        side = spec.vision.patch_size * spec.vision.merge_size
        grid = VisualGrid(1, height // side, width // side)
        image = visual_segment(chain.tokenizer, spec, self._text.image_head, self._text.image_token, grid)
        text = self._turn_text(self._text.image_turn, self._text.image, query)
        return join_segments([image, text_segment(chain.tokenizer.encode(text), image.next_position)])

    def _answers_in_frames(
        self, tokens: Array, prompt: Segment, form: JsonForm, limits: Limits, *, answer_tokens: int
    ) -> tuple[list[TextAnswer], int]:
        """Request the box in F frames in one batch; return their answers, and the number of calls of the model.

        Args:
            tokens: visual tokens of the frames [F, 1+D, n, H].
            prompt: see `_frame_prompt`.
            form: the form of each answer.
            limits: those of the call.
            answer_tokens: maximum tokens of each answer in the form.
        """
        chain, session = self._chain, self._chain.language_model
        chunk, length = prefill_chunk(session), len(prompt) - 1
        prompts = [prompt.with_rows(f * tokens.shape[2]) for f in range(len(tokens))]
        cache = chain.pool.take(batch=len(prompts), positions=len(prompt) + 2 * answer_tokens)
        visual = arrays.join(list(tokens), axis=1, zeros_before=1)
        last = prefill(session, cache, prompts, visual, chunk=chunk)
        most = min(self._options.max_tokens, answer_tokens)
        rows = [self._row(pending, form, length=length, max_tokens=most) for pending in last]
        calls = prefills = math.ceil(length / chunk)
        for made in decode_answers(session, cache, rows, self._prefix.no_visual_tokens):
            calls = prefills + made
            limits.report(calls, None)
        chain.pool.give(cache)
        return [self._text_answer(row) for row in rows], calls

    def _tube(self, times: np.ndarray, boxes: Sequence[Box], scale: tuple[int, int]) -> Tube:
        """Return the tube of boxes [N] at times [N] in seconds; boxes are in units of `scale`."""
        size = np.tile(np.asarray(self._video.size, np.float64), 2)
        pixels = np.asarray(boxes, np.float64) / np.tile(scale, 2) * size
        count = len(pixels)
        return Tube(times, pixels.astype(np.float32), np.ones(count, np.float32), np.ones(count, bool))

    def _grounding(
        self, query: str, answer: TextAnswer, *, span: Span | None, tube: Tube | None, frames: int = 0
    ) -> Grounding:
        """Return the result without task and mode; `frames` is the number of fine frames that were encoded."""
        video = self._video
        boxes = None
        if span is not None and tube is not None:
            boxes = tube.at(video.frame_times[in_span(video.frame_times, span)])
        return Grounding(
            query=query,
            found=span is not None,
            span=span,
            tube=tube,
            boxes=boxes,
            answer=answer.text,
            named_span=span,
            scores={"absent": answer.absent, "answer": answer.score, "presence": float(tube is not None)},
            heads="text",
            decoding={name: answer.counts[name] for name in COUNTS},
            **video.result_fields(self._chain.spec, frames),
        )
