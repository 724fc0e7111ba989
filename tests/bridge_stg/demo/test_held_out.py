"""The held-out scores: 1 for a perfect result, 0 for a missing one, and controls that manipulate their inputs."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.demo.held_out import Memoized, ShuffledTimes, held_out_clips, measure, score
from bridge_stg.runtime.chain.results import FrameBoxes, Grounding
from bridge_stg.runtime.video.token_budget import CoarseChoice
from tests.evaluation.validation import validate


@pytest.fixture(scope="module")
def clip():
    return next(iter(held_out_clips(1)))


def grounding(clip, query, *, found: bool = True, shift: float = 0.0) -> Grounding:
    """Return the true tube of a query as a result, with boxes moved by `shift` widths."""
    truth, boxes = clip.truth(query)
    boxes = boxes[truth] + (boxes[truth][:, 2:3] - boxes[truth][:, :1]) * [shift, 0, shift, 0]
    ones = np.ones(len(boxes), np.float32)
    frames = FrameBoxes(clip.times[truth], boxes.astype(np.float32), ones, ones > 0, ones < 0)
    return Grounding(
        query=query.text, found=found, span=(0.0, 1.0) if found else None, tube=None,
        boxes=frames if found else None, size=(clip.scene.width, clip.scene.height), answer="",
        coarse=CoarseChoice(2.0, (192, 192), 1, 36, None),
        named_span=None, scores={}, tokens={}, timings={},
    )  # fmt: skip


def test_a_perfect_tube_scores_one(clip):
    assert score(clip, clip.named, grounding(clip, clip.named)) == pytest.approx((1, 1), abs=1e-5)


def test_a_shift_by_half_a_box_scores_a_third(clip):
    assert score(clip, clip.named, grounding(clip, clip.named, shift=0.5)) == pytest.approx((1, 1 / 3), abs=1e-3)


def test_nothing_found_scores_zero(clip):
    assert score(clip, clip.named, grounding(clip, clip.named, found=False)) == (0, 0)


class Echo:
    """A session that returns its inputs and counts its calls."""

    graph = allocate_cache = None

    def __init__(self) -> None:
        self.calls = 0

    def infer(self, feeds, *, cache=None):
        self.calls += 1
        return dict(feeds)

    def close(self) -> None:
        pass


def test_memoized_computes_once_until_it_is_cleared():
    echo = Echo()
    session = Memoized(echo)
    for value in (1, 1, 2, 1):
        assert session.infer({"x": np.full(3, value)})["x"][0] == value
    assert echo.calls == 2
    session.clear()
    session.infer({"x": np.full(3, 1)})
    assert echo.calls == 3


def test_shuffled_times_permute_whole_groups_and_nothing_else():
    session = ShuffledTimes(Echo(), lambda: 2, seed=0)
    tokens = np.concatenate([np.zeros((1, 1, 1)), np.arange(8).reshape(1, 8, 1)], 1)
    out = session.infer({"visual_tokens": tokens, "visual_index": np.ones((1, 3), int)})["visual_tokens"][0, :, 0]
    pairs = out[1:].reshape(4, 2)
    assert out[0] == 0 and (pairs[:, 1] - pairs[:, 0] == 1).all() and sorted(pairs[:, 0]) == [0, 2, 4, 6]
    assert list(pairs[:, 0]) != [0, 2, 4, 6]
    again = session.infer({"visual_tokens": tokens, "visual_index": np.ones((1, 3), int)})["visual_tokens"][0, :, 0]
    np.testing.assert_array_equal(out, again)


def test_measure_reports_every_figure_of_a_random_model(tiny_model, tmp_path):
    from bridge_stg.model.torch_session import TorchSession
    from bridge_stg.runtime.bundle.contracts import GRAPHS

    sessions = {name: TorchSession(name, tiny_model) for name in GRAPHS}
    figures = measure(sessions, tiny_model.spec, tiny_model.tokenizer, clips=2, folder=tmp_path)
    validate({"model": "a random model", "seed": 0, **figures}, "demo_figures")
    assert figures["named"]["clips"] == 2 and 0 <= figures["absent_auroc"] <= 1
    assert set(figures["controls"]) == {
        "frames blanked", "query blanked", "time texts shuffled", "time texts shuffled, span as answered",
        "whole clip, centre box",
    }  # fmt: skip
    assert figures["motion"]["clips"] == 1 and figures["span_as_answered"]["clips"] == 2
    assert figures["named"]["m_vIoU"] < 0.3
    assert sorted(p.name for p in tmp_path.glob("**/*.mp4")) == ["000.mp4", "000.mp4", "001.mp4"]
