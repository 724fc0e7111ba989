"""The bridge head: the answer names a span, and the bridging queries' hidden states drive the spatial decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.chain.boxes import box_cxcywh_to_xyxy, boxes_to_pixels
from bridge_stg.runtime.chain.decode import Answer, answer_queries, positions_needed
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.opened_video import Chain, ChatMessage, Head, TextStream, VideoParts, prompts_of
from bridge_stg.runtime.chain.prompt import Segment, query_segment, query_too_long, time_strings
from bridge_stg.runtime.chain.results import FrameBoxes, Grounding, Tube, tube_in_span
from bridge_stg.runtime.chain.spans import Span, fine_frames, in_span, refine_span
from bridge_stg.runtime.chain.spatial_pass import Located, SpatialQuery, locate
from bridge_stg.runtime.chain.tasks import Task
from bridge_stg.runtime.device.array_ops import on_host
from bridge_stg.runtime.heads.chat import check_chat
from bridge_stg.runtime.host.limits import Limits


class BridgeHead:
    """Answers queries on one video with the bridging queries and the spatial decoder.

    Args:
        chain: what all videos share.
        parts: the video.
        spatial_decoder: the session that computes boxes.
        text: the head that answers questions; None: the model has none.
    """

    def __init__(self, chain: Chain, parts: VideoParts, spatial_decoder: Session, text: Head | None) -> None:
        self._chain, self._spatial_decoder, self._text = chain, spatial_decoder, text
        self._video, self._prefix, self._features = parts.facts, parts.prefix, parts.features
        times = time_strings(parts.facts.sample_times.mean(axis=1), chain.spec.prompt)
        self._grammars = {
            (allow_none, first): AnswerGrammar(
                chain.tokenizer, chain.spec.prompt, times, allow_none=allow_none, first_start=first
            )
            for allow_none, first in ((True, None), (False, None), (False, 0))
        }
        self._answer_tokens = self._grammars[True, None].longest_answer

    def ground(self, queries: Sequence[str], task: Task, limits: Limits) -> list[Grounding]:
        """Ground queries; see `Head.ground`."""
        chain, video = self._chain, self._video
        prompts = prompts_of(queries, lambda query: self._prompt(query, task))
        with limits.stage("answer"):
            answers = self._answer(prompts, self._grammars[task.grammar_key], limits)
        spans = [answer.groups and video.span_of(answer.groups) for answer in answers]
        searches = self._searches(answers, spans) if task.name != "span" else {}
        most = chain.spec.frames.max_fine_frames
        located = locate(
            self._spatial_decoder, self._features, video.fine_grid, searches, max_frames=most, limits=limits
        )
        return [
            self._result(query, task, answer, named_span=span, located=located.get(i))
            for i, (query, answer, span) in enumerate(zip(queries, answers, spans, strict=True))
        ]

    def ask(self, question: str, *, history: Sequence[ChatMessage], max_tokens: int, limits: Limits) -> TextStream:
        """Answer a question; see `Head.ask`."""
        check_chat(self._chain.spec, question, history=history, max_tokens=max_tokens)
        assert self._text is not None
        return self._text.ask(question, history=history, max_tokens=max_tokens, limits=limits)

    def _prompt(self, query: str, task: Task) -> Segment:
        chain, start = self._chain, self._prefix.next_position
        segment = query_segment(
            chain.tokenizer, chain.spec, query, start, first_box=task.relative_box(self._video.size)
        )
        language = chain.spec.language
        last = segment.next_position + self._answer_tokens + language.num_bridging_queries
        if last > language.max_positions:
            raise query_too_long(last, language.max_positions)
        return segment

    def _answer(self, prompts: list[Segment], grammar: AnswerGrammar, limits: Limits) -> list[Answer]:
        """Run the language model, in batches whose caches fit the budget."""
        pool, language = self._chain.pool, self._chain.spec.language
        answers: list[Answer] = []
        while len(answers) < len(prompts):
            rest = prompts[len(answers) :]
            positions = positions_needed(
                self._prefix.length, rest, answer_tokens=self._answer_tokens, bridging=language.num_bridging_queries
            )
            batch = rest[: pool.rows(self._prefix.cache, positions=positions)]
            cache = pool.take(batch=len(batch), positions=positions)
            answers += answer_queries(
                self._chain.language_model,
                cache,
                self._prefix,
                batch,
                grammar,
                bridging_ids=language.bridging_ids,
                report=limits.report_from(len(answers), len(prompts)),
            )
            pool.give(cache)  # not after a failed call, which leaves the cache in an unknown state
        return answers

    def _searches(self, answers: Sequence[Answer], spans: Sequence[Span | None]) -> dict[int, SpatialQuery]:
        """Choose the fine frames around the span of each answer that names one, by the answer's index."""
        spec, video = self._chain.spec, self._video
        margin_s = spec.span.margin_s
        if margin_s is None:
            margin_s = video.interval_s * spec.vision.temporal_patch_size
        # An image's only fine frame lasts as long as the image.
        fps = 1 / video.duration_s if video.is_image else spec.frames.fine_fps
        most = spec.frames.max_fine_frames
        searches = {}
        for i, (answer, span) in enumerate(zip(answers, spans, strict=True)):
            if span is not None and answer.taps is not None:
                frames = fine_frames(span, video.fine_grid, fine_fps=fps, margin_s=margin_s, max_frames=most)
                searches[i] = SpatialQuery(frames, answer.taps)
        return searches

    def _result(
        self,
        query: str,
        task: Task,
        answer: Answer,
        *,
        named_span: Span | None,
        located: Located | None,
    ) -> Grounding:
        span, tube, boxes, presence, fine = named_span, None, None, 0.0, 0
        if named_span is not None and located is not None:
            span, tube = self._refined(named_span, located, task)
            boxes = self._frame_boxes(tube, span, task)
            presence, fine = float(tube.presence.mean()), len(located.frames.indices)
        return Grounding(
            query=query,
            found=span is not None,
            span=span,
            tube=tube,
            boxes=boxes,
            answer=self._chain.tokenizer.decode(answer.ids),
            named_span=named_span,
            scores={"absent": answer.absent, "answer": math.exp(answer.log_probability), "presence": presence},
            task=task.name,
            taps=None if answer.taps is None else np.array(on_host(answer.taps)),
            **self._video.result_fields(self._chain.spec, fine),
        )

    def _refined(self, named: Span, located: Located, task: Task) -> tuple[Span, Tube]:
        """Return the span after the presence scores moved its ends, and the boxes of the fine frames in it."""
        (width, height), threshold = self._video.size, self._chain.spec.span.presence_threshold
        frames, presence = located.frames, located.presence
        start, end = refine_span(named, frames, presence, threshold=threshold, duration_s=self._video.duration_s)
        span = (start if task.first_box is None else named[0]), end
        boxes = boxes_to_pixels(box_cxcywh_to_xyxy(located.boxes), width=width, height=height)
        times = located.shown_times
        return span, tube_in_span(span, frames, shown_times=times, boxes=boxes, presence=presence, threshold=threshold)

    def _frame_boxes(self, tube: Tube, span: Span, task: Task) -> FrameBoxes:
        """Return the boxes of the video's frames inside the span; of a track those of all frames."""
        times = self._video.frame_times
        inside = in_span(times, span)
        if task.first_box is None:
            return tube.at(times[inside])
        boxes = tube.at(times)
        boxes.boxes[0] = task.first_box
        boxes.visible[~inside] = False
        return boxes
