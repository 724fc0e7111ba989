"""Training: resumable to the bit, labels that follow the runtime's rules, and a whole run in miniature."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.demo.batches import QUERIES_PER_CLIP, BatchMaker
from bridge_stg.demo.train import train_demo
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.training.train_loop import learning_rate, run_stage
from tests.errors import raises


def stage(folder, total: int, *, stop_at: int | None = None, resume: bool = True, bad_at: int | None = None):
    """Fit a line to seeded data; `stop_at` dies as a killed process would, after its last save."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def make_batch(step: int) -> torch.Tensor:
        return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))

    def loss(batch: torch.Tensor, step: int):
        if step == stop_at:
            raise KeyboardInterrupt
        value = (model(batch)[:, 0] - batch.sum(1)).pow(2).mean()
        return (value * math.nan if step == bad_at else value), {"loss": value.item()}

    run_stage("line", model, [{"params": list(model.parameters())}], loss, make_batch, folder=folder,
              total_steps=total, peak_rate=0.05, warmup=3, resume=resume, workers=0)  # fmt: skip
    return model


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr("bridge_stg.training.train_loop.CHECKPOINT_SECONDS", -1.0)
    whole = stage(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "killed", 20, stop_at=11)
    resumed = stage(tmp_path / "killed", 20)
    assert torch.equal(whole.weight, resumed.weight)
    fresh = stage(tmp_path / "killed", 20, resume=False)
    assert torch.equal(whole.weight, fresh.weight)


def test_the_log_holds_figures_of_every_step(tmp_path):
    stage(tmp_path / "run", 120)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 120]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["stage"] == "line"


def test_a_loss_that_is_not_finite_stops_with_a_reason(tmp_path):
    with raises("training.diverged", "nan", "step 4"):
        stage(tmp_path / "run", 20, bad_at=4)


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) < 1 and rates[9] > 0.95 and rates[-1] < 0.04


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
    out = train_demo(tmp_path / "demo", vision_steps=1, grounding_steps=1, tiny=True)
    model = load_checkpoint(out)
    frames = np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), np.uint8)
    result = torch_grounder(model.eval()).ground(
        ((i / 4, frame) for i, frame in enumerate(frames)), "the red car", allow_none=False
    )
    assert result.found and result.boxes is not None and result.size == (128, 96)
    assert (tmp_path / "demo-training" / "log.jsonl").read_text().count('"step"') == 2
    before = (out / "model.safetensors").read_bytes()
    train_demo(tmp_path / "demo", vision_steps=1, grounding_steps=1, tiny=True)
    assert (out / "model.safetensors").read_bytes() == before
