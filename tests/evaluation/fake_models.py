"""Models that know the truth, with errors that a test chooses. They read media only with `look`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np

from bridge_stg.evaluation.run.evaluate import Model
from bridge_stg.evaluation.samples import Dataset, Truth
from bridge_stg.runtime.chain.results import FrameBoxes, Grounding, Tube


def grounding(
    times: Any,
    boxes: Any,
    *,
    span: tuple[float, float] | None,
    size: tuple[int, int] = (96, 64),
    found: bool = True,
    absent: float = 0.1,
    query: str = "",
) -> Grounding:
    """Return an answer with this tube; without boxes, one with a span alone."""
    times, boxes = np.asarray(times, np.float64), np.asarray(boxes, np.float32).reshape(-1, 4)
    ones = np.ones(len(times), np.float32)
    tube = Tube(times, boxes, ones, ones > 0) if found and len(times) else None
    known: dict[str, Any] = {
        "query": query, "found": found, "span": span if found else None, "tube": tube, "size": size, "answer": "",
        "boxes": None if tube is None else FrameBoxes(times, boxes, ones, ones > 0, ones < 0), "named_span": span,
        "scores": {"absent": absent, "answer": 1.0, "presence": 1.0}, "tokens": {}, "timings": {},
        "unknown_words": (),
    }  # fmt: skip
    return Grounding(**{field.name: known.get(field.name) for field in dataclasses.fields(Grounding)})


class Oracle:
    """Answers each query with the truth, its boxes moved by `shift` pixels, its span by `delay` seconds.

    `failing` names queries that it fails at. `calls` lists (task, query); frames of streams are read if `look`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        shift: float = 0.0,
        delay: float = 0.0,
        failing: Iterable[str] = (),
        look: bool = False,
    ) -> None:
        self.truths: dict[tuple[str, str], Truth] = {
            (sample.task, sample.query): sample.read_truth() for sample in dataset.samples if sample.media is not None
        }
        self.shift, self.delay, self.failing, self.look = shift, delay, set(failing), look
        self.calls: list[tuple[str, str]] = []
        self.media: list[Any] = []

    def ground(self, video: Any, query: str, *, allow_none: bool = True, **options: Any) -> Grounding:
        truth = self.truth_of("tube", video, query)
        if not truth.present:
            return grounding([], [], span=None, found=not allow_none, absent=0.9, query=query)
        assert truth.span is not None
        span = (truth.span[0] + self.delay, truth.span[1] + self.delay)
        return grounding(truth.times[truth.inside], truth.boxes[truth.inside] + self.shift, span=span, query=query)

    def span(self, video: Any, query: str, *, allow_none: bool = False, **options: Any) -> Grounding:
        truth = self.truth_of("span", video, query)
        assert truth.span is not None
        return grounding([], [], span=(truth.span[0] + self.delay, truth.span[1] + self.delay), query=query)

    def locate(self, image: Any, query: str) -> Grounding:
        truth = self.truth_of("image", image, query)
        return grounding([0.0], truth.boxes + self.shift, span=(0.0, 1.0), query=query)

    def track(self, video: Any, first_box: np.ndarray, *, query: str = "the object", **options: Any) -> Grounding:
        truth = self.truth_of("track", video, query)
        assert np.allclose(first_box, truth.boxes[0])
        return grounding(truth.times, truth.boxes + self.shift, span=(0.0, 1.0), query=query)

    def truth_of(self, task: str, video: Any, query: str) -> Truth:
        self.calls.append((task, query))
        self.media.append([time for time, _ in video] if self.look and not isinstance(video, str) else video)
        if query in self.failing:
            raise RuntimeError(f"cannot see {query}")
        return self.truths[task, query]


def model(oracle: Any, label: str = "oracle", **identity: Any) -> Model:
    return Model(label, {"fingerprint": label, **identity}, lambda: nullcontext(oracle))
