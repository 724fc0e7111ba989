"""The demo's figures: held-out clips from seeds, the field's metrics on them, and controls that must fail.

Anything with `ground` is measured alike, the eager model and every bundle. Knows nothing of torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bridge_stg.demo.questions import Question, ask
from bridge_stg.demo.synthetic import Scene, make_scene, write_clip
from bridge_stg.evaluation.metrics import auroc, frame_iou, tube_iou, tube_scores
from bridge_stg.runtime.backends.session import Session, SessionWrapper
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.video.sizes import frame_sizes

HELD_OUT_SEED = 20_260_409
MOTION_SEED = HELD_OUT_SEED + 2
FRAME_RATE = 8.0
NEUTRAL_QUERY = "the object"


@dataclass(frozen=True)
class HeldOutClip:
    """A scene with held-out background, and what is asked about it."""

    index: int
    scene: Scene
    named: Question | None
    """About a name or a colour."""
    other: Question | None
    """About another thing of the same scene."""
    motion: Question | None
    absent: Question

    @property
    def times(self) -> np.ndarray:
        """Frame times [n] in seconds."""
        return np.arange(round(self.scene.duration * FRAME_RATE)) / FRAME_RATE

    def truth(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """Return bool [n] and boxes [n, 4] xyxy in pixels of what a question names."""
        assert question.thing is not None
        times = self.times
        return self.scene.things[question.thing].visible(times), self.scene.boxes_pixels(question.thing, times)


def held_out_clips(
    count: int, seed: int = HELD_OUT_SEED, *, motion_only: bool = False, split: str = "held_out"
) -> Iterator[HeldOutClip]:
    """Draw `count` clips; every one has a question about a name or colour, and one about what is not there.

    Where `motion_only`, every one has a question that only the direction decides, and may lack the first. `split` is
    that of the backgrounds.
    """
    index = 0
    for attempt in itertools.count():
        rng = np.random.default_rng((seed, attempt))
        scene = make_scene(rng, split=split, frame_rate=FRAME_RATE, twins=1.0 if motion_only else 0.3)
        questions: dict[int, Question] = {}
        motion = absent = None
        for _ in range(8):
            for question in ask(rng, scene, absent=1.0):
                if question.kind == "absent":
                    absent = absent or question
                elif question.kind == "motion":
                    motion = motion or question
                else:
                    questions.setdefault(question.thing if question.thing is not None else -1, question)
        named = list(questions.values())
        if absent is None or (motion is None if motion_only else not named):
            continue
        first, second = (*named, None, None)[:2]
        yield HeldOutClip(index, scene, first, second, motion, absent)
        index += 1
        if index == count:
            return


def clip_path(clip: HeldOutClip, folder: Path) -> Path:
    """Return the clip as an H.264 mp4 in `folder`, encoding it on first use."""
    path = folder / f"{clip.index:03d}.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.mp4")
        write_clip(clip.scene, partial, frame_rate=FRAME_RATE)
        os.replace(partial, path)
    return path


def frames_and_boxes(result: Grounding, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the frame times [n] a result covers, and its boxes [n, 4] xyxy in pixels there."""
    covered, boxes = np.zeros(len(times), bool), np.zeros((len(times), 4), np.float32)
    if result.found and result.boxes is not None:
        at = np.abs(times[:, None] - result.boxes.times[None]).argmin(0)
        covered[at], boxes[at] = True, result.boxes.boxes
    return covered, boxes


def score(clip: HeldOutClip, question: Question, result: Grounding) -> tuple[float, float]:
    """Return tIoU and vIoU of a result on the clip's own frames."""
    truth, truth_boxes = clip.truth(question)
    covered, boxes = frames_and_boxes(result, clip.times)
    return frame_iou(truth, covered), tube_iou(truth, truth_boxes, covered, boxes)


def figures_of_scenes(grounder: Grounder, count: int) -> dict[str, float]:
    """Return m_tIoU and m_vIoU on a few held-out scenes that are rendered, not encoded."""
    scores, motion = [], []
    for clip in held_out_clips(count, seed=HELD_OUT_SEED + 1):
        frames = clip.scene.render(clip.times, clip.scene.width, clip.scene.height)
        with grounder.open(zip(clip.times.tolist(), frames)) as video:
            assert clip.named is not None
            scores.append(score(clip, clip.named, video.ground(clip.named.text)))
            if clip.motion is not None:
                motion.append(score(clip, clip.motion, video.ground(clip.motion.text)))
    mean = np.mean(scores, 0)
    figures = {"held_out_tIoU": float(mean[0]), "held_out_vIoU": float(mean[1])}
    if motion:
        figures |= {"motion_tIoU": float(np.mean(motion, 0)[0]), "motion_vIoU": float(np.mean(motion, 0)[1])}
    return figures


class Remembered(SessionWrapper):
    """A session without a cache that does not compute again what it was asked before; `forget` between clips."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._known: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}

    def forget(self) -> None:
        """Drop all that was computed."""
        self._known.clear()

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: Any = None) -> dict[str, np.ndarray]:
        """Look the inputs up by their bytes, else run."""
        key = tuple((name, array.shape, hash(array.tobytes())) for name, array in feeds.items())
        if key not in self._known:
            self._known[key] = self.session.infer(feeds, cache=cache)
        return self._known[key]


class ShuffledTimes(SessionWrapper):
    """A language model session that reads each group's tokens behind another group's time text."""

    def __init__(self, session: Session, tokens_per_group: Callable[[], int], seed: int) -> None:
        super().__init__(session)
        self._tokens, self._rng = tokens_per_group, np.random.default_rng(seed)
        self._order: np.ndarray | None = None

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: Any = None) -> dict[str, np.ndarray]:
        """Permute the groups of visual_tokens, then run."""
        tokens, size = feeds["visual_tokens"], self._tokens()
        groups = (tokens.shape[1] - 1) // size
        if groups > 1 and feeds["visual_index"].any():
            order = self._rng.permutation(groups) if self._order is None or len(self._order) != groups else self._order
            self._order = order
            shuffled = tokens[:, 1:].reshape(tokens.shape[0], groups, size, -1)[:, order]
            feeds = {
                **feeds,
                "visual_tokens": np.concatenate([tokens[:, :1], shuffled.reshape(tokens[:, 1:].shape)], 1),
            }
        return self.session.infer(feeds, cache=cache)


def merged_tokens(spec: ModelSpec, scene: Scene) -> int:
    """Return the visual tokens of one coarse group."""
    factor = spec.vision.patch_size * spec.vision.merge_size
    (height, width), _ = frame_sizes(scene.height, scene.width, spec)
    return (height // factor) * (width // factor)


def measure(
    sessions: dict[str, Session], spec: ModelSpec, tokenizer: Any, *, clips: int, folder: Path
) -> dict[str, Any]:
    """Return all figures of one model on `clips` held-out clips, and half as many for motion, kept in `folder`."""
    current: list[int] = [1]
    encoder = Remembered(sessions["vision_encoder"])
    sessions = {**sessions, "vision_encoder": encoder}
    plain = Grounder(sessions, spec, tokenizer)
    no_margin = dataclasses.replace(spec, span=dataclasses.replace(spec.span, margin_s=0.0))
    as_answered = dataclasses.replace(spec, span=dataclasses.replace(spec.span, margin_s=0.0, presence_threshold=0.0))
    shuffler = ShuffledTimes(sessions["language_model"], lambda: current[0], seed=0)
    shuffled = {**sessions, "language_model": shuffler}
    others = {
        "margin 0": Grounder(sessions, no_margin, tokenizer),
        "span as answered": Grounder(sessions, as_answered, tokenizer),
        "time texts shuffled": Grounder(shuffled, spec, tokenizer),
        "time texts shuffled, span as answered": Grounder(shuffled, as_answered, tokenizer),
    }

    rows: dict[str, list[tuple[float, float]]] = {}
    swapped: list[float] = []
    shares: list[float] = []
    present_scores, absent_scores, answered = [], [], []
    for clip in tqdm(held_out_clips(clips), "held-out clips", total=clips, unit="clip"):
        path = clip_path(clip, folder)
        encoder.forget()
        current[0] = merged_tokens(spec, clip.scene)
        named = clip.named
        assert named is not None
        add = functools.partial(_add, rows, clip, named)
        with plain.open(path) as video:
            result = video.ground(named.text)
            add("named", result)
            present_scores.append(result.scores["absent"])
            shares.append(result.tokens["ratio"])
            if clip.other is not None:
                swapped.append(score(clip, named, video.ground(clip.other.text))[1])
            absent = video.ground(clip.absent.text)
            absent_scores.append(absent.scores["absent"])
            answered.append((result.found, absent.found))
            add("query blanked", video.ground(NEUTRAL_QUERY))
        for name, grounder in others.items():
            add(name, grounder.ground(path, named.text))
        grey = np.full((clip.scene.height, clip.scene.width, 3), 128, np.uint8)
        add("frames blanked", plain.ground(((float(t), grey) for t in clip.times), named.text))
        rows.setdefault("whole clip, centre box", []).append(_centre_box(clip, named))
    motion = []
    clips_of_motion = held_out_clips(max(1, clips // 2), MOTION_SEED, motion_only=True)
    for clip in tqdm(clips_of_motion, "motion clips", total=max(1, clips // 2), unit="clip"):
        assert clip.motion is not None
        encoder.forget()
        motion.append(score(clip, clip.motion, plain.ground(clip_path(clip, folder / "motion"), clip.motion.text)))
    found = np.asarray(answered)
    return {
        "named": tube_scores(*zip(*rows.pop("named"))),
        "motion": tube_scores(*zip(*motion)),
        "absent_auroc": auroc(absent_scores, present_scores),
        "absent_recognized": float(1 - found[:, 1].mean()),
        "present_found": float(found[:, 0].mean()),
        "swapped_query_vIoU": float(np.mean(swapped)) if swapped else None,
        "swapped_clips": len(swapped),
        "visual_tokens_ratio": float(np.mean(shares)),
        "margin_0": tube_scores(*zip(*rows.pop("margin 0"))),
        "span_as_answered": tube_scores(*zip(*rows.pop("span as answered"))),
        "controls": {name: tube_scores(*zip(*pairs)) for name, pairs in sorted(rows.items())},
    }


def evaluate_demo(
    out: Path, *, clips: int = 200, bundle: Path | None = None, checkpoint: Path | None = None,
    folder: Path = Path("build/held-out"), variant: str | None = None,
) -> str:  # fmt: skip
    """Measure a bundle, or a checkpoint in eager torch, write the figures as JSON and return them as text.

    Args:
        out: the JSON file.
        clips: how many held-out clips.
        bundle: measured if given, or if no checkpoint is given (the demo bundle).
        checkpoint: measured in eager torch if given.
        folder: where the clips are kept.
        variant: of the bundle.
    """
    if checkpoint is not None:
        from bridge_stg.checkpoint.checkpoint import load_checkpoint
        from bridge_stg.model.torch_session import TorchSession

        model = load_checkpoint(checkpoint)
        sessions: dict[str, Session] = {name: TorchSession(name, model) for name in GRAPHS}
        spec, tokenizer, what = model.spec, model.tokenizer, "checkpoint, eager torch fp32"
    else:
        from bridge_stg.demo.bundle import demo_bundle
        from bridge_stg.runtime.backends.choose import open_sessions
        from bridge_stg.runtime.bundle.bundle import Bundle
        from bridge_stg.runtime.chain.prompt import Tokenizer

        loaded = Bundle.load(bundle if bundle is not None else demo_bundle())
        sessions = dict(open_sessions(loaded, variant=variant))
        spec, tokenizer = loaded.manifest.spec, Tokenizer.from_file(loaded.tokenizer_path)
        what = f"bundle, {sessions['language_model'].graph.variant}"
    figures = {"model": what, "seed": HELD_OUT_SEED, **measure(sessions, spec, tokenizer, clips=clips, folder=folder)}
    text = json.dumps(_rounded(figures), indent=2)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, out)
    return text


def compare_models(
    reference: Grounder, others: dict[str, Grounder], *, clips: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Compare grounders on held-out clips: share of identical answers, and box IoU where both found a tube."""
    agree: dict[str, list[bool]] = {name: [] for name in others}
    ious: dict[str, list[np.ndarray]] = {name: [] for name in others}
    for clip in tqdm(held_out_clips(clips), "parity", total=clips, unit="clip"):
        path = clip_path(clip, folder)
        texts = [q.text for q in (clip.named, clip.absent) if q is not None]
        with reference.open(path) as video:
            expected = video.ground_many(texts)
        for name, grounder in others.items():
            with grounder.open(path) as video:
                for first, second in zip(expected, video.ground_many(texts)):
                    agree[name].append(first.answer == second.answer and first.span == second.span)
                    if first.tube is not None and second.tube is not None and len(first.tube) == len(second.tube):
                        ious[name].append(box_iou(first.tube.boxes, second.tube.boxes))
    return {
        name: {
            "queries": len(agree[name]),
            "identical_answers": float(np.mean(agree[name])),
            "box_iou_mean": float(np.concatenate(ious[name]).mean()),
            "box_iou_min": float(np.concatenate(ious[name]).min()),
        }
        for name in others
    }


def _add(rows: dict[str, list[Any]], clip: HeldOutClip, question: Question, name: str, result: Grounding) -> None:
    rows.setdefault(name, []).append(score(clip, question, result))


def _centre_box(clip: HeldOutClip, question: Question) -> tuple[float, float]:
    """Score a guess that has seen nothing: the whole clip, a box of the mean size in the middle."""
    truth, truth_boxes = clip.truth(question)
    width, height, side = clip.scene.width, clip.scene.height, 0.2
    box = np.array(
        [(0.5 - side / 2) * width, (0.5 - side / 2) * height, (0.5 + side / 2) * width, (0.5 + side / 2) * height]
    )
    everywhere = np.ones(len(truth), bool)
    boxes = np.repeat(box[None].astype(np.float32), len(truth), 0)
    return frame_iou(truth, everywhere), tube_iou(truth, truth_boxes, everywhere, boxes)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
