"""Compare the demo's text heads with its bridge heads on held-out clips and images from seeds. Must not know torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from bridge_stg.demo.bundle import demo_bundle
from bridge_stg.demo.held_out import HELD_OUT_SEED, HeldOutClip, clip_path, held_out_clips, score
from bridge_stg.demo.questions import Question, ask
from bridge_stg.demo.synthetic import Scene, make_scene
from bridge_stg.evaluation.metrics import auroc, tube_scores
from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.backends.session import Session, SessionWrapper
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.tokenizer import load_tokenizer
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions
from bridge_stg.runtime.host.files import replacing

STILL_SEED = HELD_OUT_SEED + 3
STILL_TIME = np.zeros(1)
LENGTHS = {"short": (0.0, 2.5), "middle": (2.5, 4.5), "long": (4.5, 100.0)}
"""Lengths of tubes in seconds, from the first to below the second."""
WAYS = {
    "bridge": None,
    "text, joint": TextOptions(mode="joint"),
    "text, two-step": TextOptions(mode="two-step"),
    "text, joint, no drafts": TextOptions(mode="joint", drafts=False),
}
"""How tubes are found: with bridge heads, or with text heads and their options."""


def held_out_stills(count: int, seed: int = STILL_SEED) -> Iterator[tuple[Scene, Question]]:
    """Yield images with held-out backgrounds, each with a query about one thing in it."""
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        scene, queries = make_scene(rng, split="held_out", still=True), list[Question]()
        while not queries:
            queries = ask(rng, scene, absent=0.0)
        yield scene, queries[0]


def locate_iou(grounder: Grounder, scene: Scene, query: Question) -> float:
    """Return the IoU of the box that is found in an image."""
    assert query.thing is not None
    image = scene.render(STILL_TIME, scene.width, scene.height)[0]
    boxes = grounder.locate(image, query.text).boxes
    return 0.0 if boxes is None else float(box_iou(boxes.boxes[0], scene.boxes_pixels(query.thing, STILL_TIME)[0]))


def score_rendered_text(grounder: Grounder, clips: int, stills: int) -> dict[str, float]:
    """Return the scores of a few clips, rendered and not encoded as video, and of a few images."""
    ious = [locate_iou(grounder, *still) for still in held_out_stills(stills, STILL_SEED + 1)]
    tubes = []
    for clip in held_out_clips(clips, seed=HELD_OUT_SEED + 1):
        assert clip.named is not None
        frames = clip.scene.render(clip.times, clip.scene.width, clip.scene.height)
        result = grounder.ground(zip(clip.times.tolist(), frames), clip.named.text)
        tubes.append(score(clip, clip.named, result))
    tiou, viou = np.mean(tubes, 0)
    return {
        "held_out_IoU": float(np.mean(ious)), "held_out_Acc@0.5": float(np.mean(np.array(ious) >= 0.5)),
        "held_out_tIoU": float(tiou), "held_out_vIoU": float(viou),
    }  # fmt: skip


class CountedCalls(SessionWrapper):
    """A session that counts its calls."""

    calls = 0

    def infer(self, feeds: Mapping[str, Any], *, cache: Any = None) -> dict[str, Any]:
        """Run the graph."""
        self.calls += 1
        return super().infer(feeds, cache=cache)


@dataclass(frozen=True)
class Found:
    """What one way found for one query: scores, calls of the language model, seconds and the result."""

    length_s: float
    scores: tuple[float, float]
    calls: int
    seconds: float
    result: Grounding


@dataclass(frozen=True)
class Model:
    """The sessions, spec and tokenizer of one model."""

    sessions: dict[str, Session]
    spec: ModelSpec
    tokenizer: Tokenizer

    def grounder(self, text: TextOptions | None) -> Grounder:
        """Return a grounder whose calls of the language model are counted."""
        sessions = {**self.sessions, "language_model": CountedCalls(self.sessions["language_model"])}
        return Grounder(sessions, self.spec, self.tokenizer, text=text)


def find(grounder: Grounder, clip: HeldOutClip, query: Question, folder: Path) -> Found:
    """Find the tube of a query in a clip, from the video file on."""
    path, language = clip_path(clip, folder), cast(CountedCalls, grounder.sessions["language_model"])
    before, started = language.calls, time.perf_counter()
    result = grounder.ground(path, query.text)
    seconds = time.perf_counter() - started
    thing = None if query.thing is None else clip.scene.things[query.thing]
    length_s, scores = (0.0, (0.0, 0.0)) if thing is None else (thing.end - thing.start, score(clip, query, result))
    return Found(length_s, scores, language.calls - before, seconds, result)


def compare(bridge: Model, text: Model, *, clips: int, folder: Path) -> dict[str, Any]:
    """Return the figures of both heads on the same `clips` held-out clips, and of text heads on as many images."""
    grounders = {way: (bridge if options is None else text).grounder(options) for way, options in WAYS.items()}
    joint = grounders["text, joint"]
    stills = tqdm(held_out_stills(clips), "held-out images", total=clips, unit="image")
    ious = np.array([locate_iou(joint, *still) for still in stills])
    rows: dict[str, list[Found]] = {way: [] for way in WAYS}
    absent: list[Found] = []
    for clip in tqdm(held_out_clips(clips), "held-out clips", total=clips, unit="clip"):
        assert clip.named is not None
        for way, found in rows.items():
            found.append(find(grounders[way], clip, clip.named, folder))
        absent.append(find(joint, clip, clip.absent, folder))
    present = rows["text, joint"]
    return {
        "seed": HELD_OUT_SEED,
        "image": {"images": clips, "mean_IoU": ious.mean(), "Acc@0.5": (ious >= 0.5).mean()},
        "absent_auroc": auroc(*([one.result.scores["absent"] for one in found] for found in (absent, present))),
        "absent_recognized": np.mean([not one.result.found for one in absent]),
        "present_found": np.mean([one.result.found for one in present]),
        "tubes": {way: by_length(found) for way, found in rows.items()},
    }


def evaluate_text_demo(
    out: Path, *, text: Path, bundle: Path | None = None, clips: int = 100, folder: Path = Path("build/held-out")
) -> str:
    """Compare bundles of both heads; write the figures as JSON to `out`, and return them as text.

    Args:
        out: the file.
        text: bundle with text heads.
        bundle: bundle with bridge heads; None: that of the demo.
        clips: number of held-out clips, and of images.
        folder: where the clips are written, or read if they exist.
    """
    models = [_open(bundle if bundle is not None else demo_bundle()), _open(text)]
    found = json.dumps(compare(*models, clips=clips, folder=folder), default=float)
    written = json.dumps(json.loads(found, parse_float=lambda value: round(float(value), 4)), indent=2)
    with replacing(out) as partial:
        partial.write_text(written + "\n", encoding="utf-8")
    return written


def _open(bundle: Path) -> Model:
    loaded = Bundle.load(bundle)
    spec = loaded.manifest.spec
    return Model(dict(open_sessions(loaded)), spec, load_tokenizer(loaded.tokenizer_path, spec))


def by_length(found: Sequence[Found]) -> dict[str, Any]:
    """Return mean figures of all tubes and of those of each length."""
    groups = {"all": list(found)}
    for name, (least, below) in LENGTHS.items():
        groups[name] = [one for one in found if least <= one.length_s < below]
    return {name: _mean(group) for name, group in groups.items() if group}


def _mean(found: Sequence[Found]) -> dict[str, Any]:
    return {
        "clips": len(found),
        **tube_scores(*zip(*(one.scores for one in found))),
        "calls": np.mean([one.calls for one in found]),
        "seconds": np.mean([one.seconds for one in found]),
        "tokens": np.mean([one.result.decoding.get("tokens", 0) for one in found]),
        "accepted": np.mean([one.result.decoding.get("accepted", 0) for one in found]),
    }
