"""Evaluate the demo on held-out clips from seeds, with controls on manipulated inputs that must score low.

The torch model and every bundle are evaluated with the same code. Must not know torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bridge_stg.demo.questions import Question, ask
from bridge_stg.demo.synthetic import Scene, make_scene, write_clip
from bridge_stg.evaluation.metrics import auroc, frame_iou, tube_iou, tube_scores
from bridge_stg.runtime.backends.session import Session, SessionWrapper
from bridge_stg.runtime.bundle.contracts import graphs_of
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.video.sizes import frame_sizes

HELD_OUT_SEED = 20_260_409
MOTION_SEED = HELD_OUT_SEED + 2
FRAME_RATE = 8.0
NEUTRAL_QUERY = "the object"


@dataclass(frozen=True)
class HeldOutClip:
    """A scene with a held-out background, and queries about it."""

    index: int
    scene: Scene
    named: Question | None  # with a name or a colour
    other: Question | None  # about another thing of the same scene
    motion: Question | None
    absent: Question

    @property
    def times(self) -> np.ndarray:
        """Frame times [n] in seconds."""
        return np.arange(round(self.scene.duration * FRAME_RATE)) / FRAME_RATE

    def truth(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """Return visibility bool [n] and boxes [n, 4] xyxy in pixels of the target of a query."""
        assert question.thing is not None
        times = self.times
        return self.scene.things[question.thing].visible(times), self.scene.boxes_pixels(question.thing, times)


def held_out_clips(
    count: int, seed: int = HELD_OUT_SEED, *, motion_only: bool = False, split: str = "held_out"
) -> Iterator[HeldOutClip]:
    """Yield random clips, each with a query by name or colour and one about an absent thing.

    With `motion_only`, each has a query that only the direction decides, but maybe none by name. `split` is that of the
    backgrounds.
    """
    index = 0
    for attempt in itertools.count():
        rng = np.random.default_rng((seed, attempt))
        scene = make_scene(rng, split=split, frame_rate=FRAME_RATE, twins=1.0 if motion_only else 0.3)
        by_thing: dict[int | None, Question] = {}
        motion = absent = None
        for _ in range(8):
            for query in ask(rng, scene, absent=1.0):
                if query.kind == "absent":
                    absent = absent or query
                elif query.kind == "motion":
                    motion = motion or query
                else:
                    by_thing.setdefault(query.thing, query)
        named = list(by_thing.values())
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
        with replacing(path) as partial:
            write_clip(clip.scene, partial, frame_rate=FRAME_RATE)
    return path


def score(clip: HeldOutClip, query: Question, result: Grounding) -> tuple[float, float]:
    """Return tIoU and vIoU of a result on the clip's frames."""
    truth, truth_boxes = clip.truth(query)
    covered, boxes = np.zeros(len(truth), bool), np.zeros((len(truth), 4), np.float32)
    if result.found and result.boxes is not None:
        at = np.abs(clip.times[:, None] - result.boxes.times[None]).argmin(0)
        covered[at], boxes[at] = True, result.boxes.boxes
    return frame_iou(truth, covered), tube_iou(truth, truth_boxes, covered, boxes)


def score_rendered_scenes(grounder: Grounder, count: int) -> dict[str, float]:
    """Return m_tIoU and m_vIoU on a few held-out scenes that are rendered, not encoded as video."""
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


class Memoized(SessionWrapper):
    """A session without a KV cache that stores its outputs by the bytes of the inputs, until `clear`."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._known: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}
        self.clear = self._known.clear

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: Any = None) -> dict[str, np.ndarray]:
        """Return stored outputs, or run the graph."""
        key = tuple((name, array.shape, hash(array.tobytes())) for name, array in feeds.items())
        if key not in self._known:
            self._known[key] = self.session.infer(feeds, cache=cache)
        return self._known[key]


class ShuffledTimes(SessionWrapper):
    """A language model session in which each group's visual tokens follow the time text of another group."""

    def __init__(self, session: Session, tokens_per_group: Callable[[], int], seed: int) -> None:
        super().__init__(session)
        self._tokens, self._rng = tokens_per_group, np.random.default_rng(seed)
        self._order: np.ndarray | None = None

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: Any = None) -> dict[str, np.ndarray]:
        """Permute the groups of visual_tokens, then run the graph."""
        tokens, size = feeds["visual_tokens"], self._tokens()
        groups = (tokens.shape[1] - 1) // size
        if groups > 1 and feeds["visual_index"].any():
            order = self._rng.permutation(groups) if self._order is None or len(self._order) != groups else self._order
            self._order = order
            shuffled = tokens[:, 1:].reshape(tokens.shape[0], groups, size, -1)[:, order]
            tokens = np.concatenate([tokens[:, :1], shuffled.reshape(tokens[:, 1:].shape)], 1)
            feeds = {**feeds, "visual_tokens": tokens}
        return self.session.infer(feeds, cache=cache)


def _scores(pairs: list[tuple[float, float]]) -> dict[str, float]:
    return {"clips": len(pairs), **tube_scores(*zip(*pairs))}


def measure(
    sessions: dict[str, Session], spec: ModelSpec, tokenizer: Any, *, clips: int, folder: Path
) -> dict[str, Any]:
    """Return the scores of a model and of the controls on `clips` held-out clips, and half as many for motion."""
    tokens_per_group = 1
    encoder = Memoized(sessions["vision_encoder"])
    sessions = {**sessions, "vision_encoder": encoder}
    plain = Grounder(sessions, spec, tokenizer)
    no_margin = dataclasses.replace(spec, span=dataclasses.replace(spec.span, margin_s=0.0))
    as_answered = dataclasses.replace(spec, span=dataclasses.replace(spec.span, margin_s=0.0, presence_threshold=0.0))
    shuffler = ShuffledTimes(sessions["language_model"], lambda: tokens_per_group, seed=0)
    shuffled = {**sessions, "language_model": shuffler}
    others = {
        "margin 0": Grounder(sessions, no_margin, tokenizer),
        "span as answered": Grounder(sessions, as_answered, tokenizer),
        "time texts shuffled": Grounder(shuffled, spec, tokenizer),
        "time texts shuffled, span as answered": Grounder(shuffled, as_answered, tokenizer),
    }

    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    swapped, ratios, present_scores, absent_scores, found = [], [], [], [], []
    for clip in tqdm(held_out_clips(clips), "held-out clips", total=clips, unit="clip"):
        path = clip_path(clip, folder)
        encoder.clear()
        (height, width), _ = frame_sizes(clip.scene.height, clip.scene.width, spec)
        tokens_per_group = height * width // (spec.vision.patch_size * spec.vision.merge_size) ** 2
        named = clip.named
        assert named is not None
        with plain.open(path) as video:
            result = video.ground(named.text)
            rows["named"].append(score(clip, named, result))
            present_scores.append(result.scores["absent"])
            ratios.append(result.tokens["ratio"])
            if clip.other is not None:
                swapped.append(score(clip, named, video.ground(clip.other.text))[1])
            absent = video.ground(clip.absent.text)
            absent_scores.append(absent.scores["absent"])
            found.append((result.found, absent.found))
            rows["query blanked"].append(score(clip, named, video.ground(NEUTRAL_QUERY)))
        for name, grounder in others.items():
            rows[name].append(score(clip, named, grounder.ground(path, named.text)))
        grey = np.full((clip.scene.height, clip.scene.width, 3), 128, np.uint8)
        blank = plain.ground(((float(t), grey) for t in clip.times), named.text)
        rows["frames blanked"].append(score(clip, named, blank))
        rows["whole clip, centre box"].append(_centre_box(clip, named))
    motion_clips = held_out_clips(max(1, clips // 2), MOTION_SEED, motion_only=True)
    for clip in tqdm(motion_clips, "motion clips", total=max(1, clips // 2), unit="clip"):
        assert clip.motion is not None
        encoder.clear()
        rows["motion"].append(
            score(clip, clip.motion, plain.ground(clip_path(clip, folder / "motion"), clip.motion.text))
        )
    present_found, absent_found = np.mean(found, 0)
    return {
        "named": _scores(rows.pop("named")),
        "motion": _scores(rows.pop("motion")),
        "absent_auroc": auroc(absent_scores, present_scores),
        "absent_recognized": float(1 - absent_found),
        "present_found": float(present_found),
        "swapped_query_vIoU": float(np.mean(swapped)) if swapped else None,
        "swapped_clips": len(swapped),
        "visual_tokens_ratio": float(np.mean(ratios)),
        "margin_0": _scores(rows.pop("margin 0")),
        "span_as_answered": _scores(rows.pop("span as answered")),
        "controls": {name: _scores(pairs) for name, pairs in sorted(rows.items())},
    }


def evaluate_demo(
    out: Path, *, clips: int = 200, bundle: Path | None = None, checkpoint: Path | None = None,
    folder: Path = Path("build/held-out"), variant: str | None = None,
) -> str:  # fmt: skip
    """Evaluate a bundle, or a checkpoint in eager torch; write the scores as JSON to `out` and return them as text.

    Without `bundle` and `checkpoint`, it is the demo bundle. The held-out clips are written to `folder`, or read from
    there. `variant` is that of the bundle's graphs, None for the default.
    """
    if checkpoint is not None:
        from bridge_stg.checkpoint.checkpoint import load_checkpoint
        from bridge_stg.model.torch_session import TorchSession

        model = load_checkpoint(checkpoint)
        sessions: dict[str, Session] = {name: TorchSession(name, model) for name in graphs_of(model.spec)}
        spec, tokenizer, what = model.spec, model.tokenizer, "checkpoint, eager torch fp32"
    else:
        from bridge_stg.demo.bundle import demo_bundle
        from bridge_stg.runtime.backends.choose import open_sessions
        from bridge_stg.runtime.bundle.bundle import Bundle
        from bridge_stg.runtime.chain.tokenizer import load_tokenizer

        loaded = Bundle.load(bundle if bundle is not None else demo_bundle())
        sessions = dict(open_sessions(loaded, variant=variant))
        spec = loaded.manifest.spec
        tokenizer = load_tokenizer(loaded.tokenizer_path, spec)
        what = f"bundle, {sessions['language_model'].graph.variant}"
    figures = {"model": what, "seed": HELD_OUT_SEED, **measure(sessions, spec, tokenizer, clips=clips, folder=folder)}
    text = json.dumps(_rounded(figures), indent=2)
    with replacing(out) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return text


def _centre_box(clip: HeldOutClip, query: Question) -> tuple[float, float]:
    """Score a guess without any input: the whole clip, with a box of the mean size in the middle."""
    truth, truth_boxes = clip.truth(query)
    corners = np.repeat([0.4, 0.6], 2) * np.tile([clip.scene.width, clip.scene.height], 2)
    everywhere = np.ones(len(truth), bool)
    boxes = np.repeat(corners[None].astype(np.float32), len(truth), 0)
    return frame_iou(truth, everywhere), tube_iou(truth, truth_boxes, everywhere, boxes)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(member) for name, member in value.items()}
    return round(value, 4) if isinstance(value, float) else value
