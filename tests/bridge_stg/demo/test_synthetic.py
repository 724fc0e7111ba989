"""The generator keeps its promises: spans, sizes, distractors, unambiguous questions, disjoint backgrounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bridge_stg.demo.held_out import HELD_OUT_SEED, held_out_clips
from bridge_stg.demo.questions import ask, ask_to_track
from bridge_stg.demo.sprites import COLOUR_NAMES, HELD_OUT_PHOTOS, NAMES, TRAIN_PHOTOS
from bridge_stg.demo.synthetic import DIRECTION_NAMES, make_scene, write_clip
from bridge_stg.demo.tiny_model import demo_config
from bridge_stg.model.config import BridgeSTGConfig

ROOT = Path(__file__).parents[3]
SCENES = [make_scene(np.random.default_rng(seed), frame_rate=8) for seed in range(150)]


def test_spans_and_areas_are_in_range():
    for scene in SCENES:
        for thing in scene.things:
            share = (thing.end - thing.start) / scene.duration
            assert 0.15 - 0.125 / scene.duration <= share <= 0.6 + 0.125 / scene.duration
            assert 0 <= thing.start < thing.end <= scene.duration
            boxes = thing.boxes(np.array([thing.start, thing.end]))
            areas = boxes[:, 2:].prod(1)
            assert (areas > 0.0095).all() and (areas < 0.105).all()
            assert (boxes[:, :2] - boxes[:, 2:] / 2 > -1e-4).all() and (boxes[:, :2] + boxes[:, 2:] / 2 < 1.0001).all()


def test_there_is_always_a_distractor_and_often_a_hard_one():
    assert all(len(scene.things) >= 2 for scene in SCENES)
    pairs = [(s.things[0], s.things[1:]) for s in SCENES]
    name = np.mean([any(o.name == t.name and o.colour != t.colour for o in others) for t, others in pairs])
    colour = np.mean([any(o.colour == t.colour and o.name != t.name for o in others) for t, others in pairs])
    assert name > 0.2 and colour > 0.2


def test_questions_name_exactly_one_thing():
    rng = np.random.default_rng(0)
    kinds = set()
    for scene in SCENES:
        for question in ask(rng, scene):
            fits = [
                i for i, thing in enumerate(scene.things)
                if question.name in (None, thing.name) and question.colour in (None, thing.colour)
                and question.direction in (None, thing.direction)
            ]  # fmt: skip
            assert fits == ([] if question.thing is None else [question.thing])
            kinds.add(question.kind)
            for word, names in (
                (question.name, NAMES),
                (question.colour, COLOUR_NAMES),
                (question.direction, DIRECTION_NAMES),
            ):
                assert word is None or names[word] in question.text
    assert kinds == {"name", "colour", "motion", "absent"}


def test_the_demo_knows_the_words_of_its_queries_and_no_other():
    spec, rng = demo_config().model_spec(), np.random.default_rng(0)
    texts = [query.text for _ in range(10) for scene in SCENES for query in ask(rng, scene)]
    texts += [ask_to_track(rng, scene, 0).text for scene in SCENES]
    assert not {word for text in texts for word in spec.unknown_words(text)}
    assert spec.knows is not None and set(spec.knows.words) == {"an", *" ".join(texts).split()}
    assert spec.unknown_words("The man with a red dog") == ("man", "with")
    assert BridgeSTGConfig.load(ROOT / "assets" / "demo" / "checkpoint") == demo_config()


def test_things_move_as_they_are_called():
    for scene in SCENES:
        for thing in scene.things:
            if thing.direction is not None:
                travel = np.subtract(thing.last, thing.first)
                axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[
                    DIRECTION_NAMES[thing.direction]
                ]
                assert travel[axis] * sign > 0.04 and abs(travel[axis]) > abs(travel[1 - axis])


def test_rendering_shows_the_thing_in_its_box_and_only_then():
    scene = next(s for s in SCENES if not s.drift and not s.noise and s.jpeg is None)
    thing = scene.things[0]
    middle = (thing.start + thing.end) / 2
    (with_it,) = scene.render([middle], scene.width, scene.height)
    import dataclasses

    bare = dataclasses.replace(scene, things=scene.things[1:])
    (without,) = bare.render([middle], scene.width, scene.height)
    changed = np.argwhere((with_it != without).any(-1))
    left, top, right, bottom = scene.boxes_pixels(0, np.array([middle]))[0]
    assert np.abs(changed.min(0) - [top, left]).max() <= 3 and np.abs(changed.max(0) + 1 - [bottom, right]).max() <= 3
    outside = [thing.start - 0.2, thing.end + 0.2]
    np.testing.assert_array_equal(scene.render(outside, 64, 64), bare.render(outside, 64, 64))


def test_the_same_seed_draws_the_same_scene():
    first, second = (make_scene(np.random.default_rng(5)) for _ in range(2))
    assert first.things == second.things
    np.testing.assert_array_equal(first.render([0, 1], 96, 64), second.render([0, 1], 96, 64))


def test_held_out_backgrounds_are_not_those_of_training():
    assert not set(TRAIN_PHOTOS) & set(HELD_OUT_PHOTOS)
    clips = list(held_out_clips(6))
    again = list(held_out_clips(6, HELD_OUT_SEED))
    assert [c.named for c in clips] == [c.named for c in again]
    assert all(c.named is not None and c.absent.thing is None for c in clips)


def test_written_clip_is_h264_with_the_scenes_frames(tmp_path):
    av = pytest.importorskip("av")
    scene = make_scene(np.random.default_rng(3), size=(320, 320), duration=2.0)
    times = write_clip(scene, tmp_path / "clip.mp4", frame_rate=8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == len(times) == 16
    assert np.abs(np.stack(frames).astype(int) - scene.render(times, 320, 320)).mean() < 12
