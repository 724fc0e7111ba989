"""The demo's training: labels that follow the runtime's rules, and a whole run in miniature."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.demo.training.batches import QUERIES_PER_CLIP, BatchMaker
from bridge_stg.demo.training.train import demo_recipe, train_demo
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime.chain.prompt import Tokenizer
from tests.errors import raises


@pytest.fixture(scope="module")
def batch(tiny_model, tokenizer_path):
    return BatchMaker(tiny_model.spec, tokenizer_path, 0, clips=3, fine_frames=6)(2)


def test_batches_follow_from_seed_and_step(tiny_model, tokenizer_path, batch):
    again = BatchMaker(tiny_model.spec, tokenizer_path, 0, clips=3, fine_frames=6)(2)
    assert torch.equal(batch.frames, again.frames) and torch.equal(batch.input_ids, again.input_ids)
    assert torch.equal(batch.boxes, again.boxes) and torch.equal(batch.mask, again.mask)


def test_rows_hold_query_answer_and_bridging_ids(tiny_model, tokenizer_path, batch):
    tokenizer = Tokenizer.from_file(tokenizer_path)
    queries = tiny_model.spec.language.num_bridging_queries
    vocab = tiny_model.spec.language.vocab_size
    for row, length in enumerate(batch.length.tolist()):
        ids = batch.input_ids[row, :length].tolist()
        assert ids[-queries:] == list(range(vocab, vocab + queries))
        text = tokenizer.decode(ids[:-queries])
        answer = text.split("assistant\n")[1]
        found = batch.span[row, 0] >= 0
        assert (answer == "none") != bool(found) and (not found or answer.count(" seconds>") == 2)
        targets = batch.target[row]
        for position in torch.nonzero(targets >= 0)[:, 0].tolist():
            assert batch.input_ids[row, position + 1] == targets[position]


def test_absent_queries_have_no_positive_frames(batch):
    absent = (batch.span[:, 0] < 0).reshape(-1, QUERIES_PER_CLIP)
    assert not batch.positive[absent].any()
    assert batch.mask.any(-1).all()


def test_image_batches_have_one_group(tiny_model, tokenizer_path):
    images = BatchMaker(tiny_model.spec, tokenizer_path, 0, clips=2)(7)
    assert images.frames.shape[1] == 1 and images.fine.shape[1] == 1
    assert torch.equal(images.frames[:, 0, 0], images.frames[:, 0, 1])


def test_tracking_batches_print_the_first_box_and_start_at_the_first_time(tiny_model, tokenizer_path):
    batch = BatchMaker(tiny_model.spec, tokenizer_path, 0, clips=3)(3)
    tokenizer = Tokenizer.from_file(tokenizer_path)
    tracked = 0
    for row, length in enumerate(batch.length.tolist()):
        text = tokenizer.decode(batch.input_ids[row, :length].tolist())
        if "first at" not in text:
            continue
        tracked += 1
        printed = [int(n) for n in text.split("first at ")[1].split(".")[0].split()]
        assert batch.span[row, 0] == 0 and len(printed) == 4
        seen = batch.fine_times[row // QUERIES_PER_CLIP] == 0
        if seen.any():
            x, y, w, h = batch.boxes[row // QUERIES_PER_CLIP, row % QUERIES_PER_CLIP, seen][0].tolist()
            assert printed == pytest.approx(
                [999 * (x - w / 2), 999 * (y - h / 2), 999 * (x + w / 2), 999 * (y + h / 2)], abs=1
            )
    assert tracked >= 3


def test_train_demo_in_miniature(tmp_path):
    recipe = demo_recipe({"vision": 1, "grounding": 1})
    out = train_demo(tmp_path / "demo", recipe, tiny=True)
    model = load_checkpoint(out)
    frames = np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), np.uint8)
    result = torch_grounder(model.eval()).ground(
        ((i / 4, frame) for i, frame in enumerate(frames)), "the red car", allow_none=False
    )
    assert result.found and result.boxes is not None and result.size == (128, 96)
    assert (tmp_path / "demo-training" / "log.jsonl").read_text().count('"step"') == 2
    weights = (out / "model.safetensors").read_bytes()
    train_demo(out, recipe, tiny=True)
    assert (out / "model.safetensors").read_bytes() == weights
    with raises("training.other_options", "seed"):
        train_demo(out, demo_recipe({"vision": 1, "grounding": 1}, seed=1), tiny=True)

    started = train_demo(tmp_path / "started", demo_recipe({"vision": 1}), start=out, tiny=True)
    before, after = model.state_dict(), load_checkpoint(started).state_dict()
    changed = {name.partition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"vision_encoder"}
    other = shutil.copytree(started, tmp_path / "other")
    with raises("training.other_options", "start"):
        train_demo(started, demo_recipe({"vision": 1}), start=other, tiny=True)
    with raises("output.is_input", out):
        train_demo(out, demo_recipe({"vision": 1}), start=out, tiny=True)
