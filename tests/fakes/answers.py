"""Scripted answers of the fake chain, and the comparison of two results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bridge_stg.runtime import Grounding

# Groups of two samples, 0.5 s apart: group k has the samples k and k + 0.5, and the time k + 0.25.
CAR = "<2.2 seconds> to <4.2 seconds>"
SCRIPT = {
    "the car": CAR,
    "the dog": "<0.2 seconds> to <1.2 seconds>",
    "the cat": "none",
    "the end": "<6.2 seconds> to <7.2 seconds>",
}
QUERIES = ["the car", "the dog", "the cat", "the end", "a bird", "the car that turns left", "two men"]


def same(a: Grounding, b: Grounding) -> None:
    assert (a.query, a.found, a.span, a.named_span, a.answer, a.size) == (
        b.query,
        b.found,
        b.span,
        b.named_span,
        b.answer,
        b.size,
    )
    assert a.scores == pytest.approx(b.scores) and a.tokens == b.tokens
    if a.tube is not None and b.tube is not None and a.boxes is not None and b.boxes is not None:
        np.testing.assert_array_equal(a.tube.times, b.tube.times)
        np.testing.assert_allclose(a.tube.boxes, b.tube.boxes, atol=1e-4)
        np.testing.assert_array_equal(a.tube.visible, b.tube.visible)
        np.testing.assert_allclose(a.boxes.boxes, b.boxes.boxes, atol=1e-4)


def write_video(path: Path, frames: list[tuple[float, np.ndarray]], fps: int = 8) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": "1", "g": "12"})
        stream.height, stream.width = frames[0][1].shape[:2]
        stream.pix_fmt = "yuv444p"
        for _, frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
