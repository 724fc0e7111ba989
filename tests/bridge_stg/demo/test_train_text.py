"""The demo's text heads: answers that the grammar writes too, a resumable run, and its checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.demo.bundle import demo_checkpoint
from bridge_stg.demo.text_heads.batches import TextBatch, TextBatchMaker
from bridge_stg.demo.text_heads.held_out import WAYS, Model, compare, held_out_stills
from bridge_stg.demo.text_heads.model import SCALE, SIDES, first_side_id, text_config, write_text_tokenizer
from bridge_stg.demo.text_heads.train import held_out_scores, train_text_demo
from bridge_stg.demo.training.batches import QUERIES_PER_CLIP
from bridge_stg.demo.training.train import demo_recipe
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession, torch_grounder
from bridge_stg.runtime.bundle.contracts import graphs_of
from bridge_stg.runtime.bundle.spec import TextSpec
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.chain.tokenizer import load_tokenizer
from bridge_stg.runtime.heads.json_grammar import ConstrainedDecoding, JsonForm, JsonGrammar
from bridge_stg.training.loop.trainer import TrainingStopped
from bridge_stg.training.recipe import Validation

STOP = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    write_text_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def text(tokenizer_file: Path) -> TextSpec:
    spec = text_config().model_spec()
    load_tokenizer(tokenizer_file, spec)
    assert spec.text is not None
    return spec.text


@pytest.fixture(scope="module")
def batches(tokenizer_file: Path) -> list[TextBatch]:
    make = TextBatchMaker(text_config().model_spec(), tokenizer_file, 0, clips=4)
    return [make(step) for step in range(2)]


def answers(batch: TextBatch, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Return the prompt of each row as text, and the ids of its answer."""
    found = []
    for ids, target in zip(batch.input_ids, batch.target, strict=True):
        first = int((target >= 0).int().argmax()) + 1
        answer = target[target >= 0].tolist()
        assert answer[-1] == tokenizer.id_of(STOP) and ids[first : first + len(answer) - 1].tolist() == answer[:-1]
        found.append((tokenizer.decode(ids[:first].tolist()), answer[:-1]))
    return found


def opened(model: BridgeSTG) -> Model:
    assert model.tokenizer is not None
    sessions = {name: TorchSession(name, model) for name in graphs_of(model.spec)}
    return Model(sessions, model.spec, model.tokenizer)


def test_the_grammar_writes_the_same_tokens(batches: list[TextBatch], tokenizer_file: Path, text: TextSpec) -> None:
    """Every token of an answer is forced, or one of those that the grammar allows: what training teaches is written."""
    tokenizer = Tokenizer.from_file(tokenizer_file)
    grammar, forms = JsonGrammar(tokenizer), set()
    for batch in batches:
        times = tuple(re.findall(r"<([\d.]+) seconds>", tokenizer.decode(batch.prefix.input_ids.tolist())))
        for prompt, ids in answers(batch, tokenizer):
            verb, query = prompt.split(".<|im_end|>")[0].removeprefix("<|vision_end|>").split(" ", 1)
            label = None if verb == "find" else json.dumps(query)
            form = JsonForm(text, () if verb == "locate" else times, scale=(SCALE, SCALE), label=label)
            decoding = ConstrainedDecoding(grammar, form, max_tokens=1000)
            while not decoding.done:
                decoding.forced()
                if not decoding.done:
                    following = ids[len(decoding.ids)]
                    assert following in decoding.allowed()
                    decoding.accept([following])
            assert decoding.ids == ids
            forms.add((verb, tokenizer.decode(ids) == form.absent))
    assert {verb for verb, _ in forms} == {"track", "find", "locate"} and ("track", True) in forms


def test_boxes_and_visual_tokens_name_the_same_place(batches: list[TextBatch], tokenizer_file: Path) -> None:
    tokenizer, checked = Tokenizer.from_file(tokenizer_file), 0
    for batch in batches:
        spans = batch.frames.shape[1]
        rows, columns = (size // 32 for size in batch.frames.shape[3:5])
        for i, (cells, box) in enumerate(zip(batch.cell, batch.box, strict=True)):
            for place in torch.nonzero(cells >= 0)[::4, 0].tolist():
                sides = [
                    int(tokenizer.decode([t])[:-1].rstrip(",")) for t in batch.target[i, place : place + 4].tolist()
                ]
                x, y, w, h = box[place].tolist()
                clipped = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, 1)
                assert sides == pytest.approx(clipped * SCALE, abs=1)
                group, cell = divmod(int(cells[place]), rows * columns)
                assert group < spans and abs((cell % columns + 0.5) / columns - x) <= 0.51 / columns
                covering = batch.boxes[i // QUERIES_PER_CLIP, int(cells[place])]
                assert covering[2] > 0 and batch.looks[i // QUERIES_PER_CLIP, int(cells[place])].any()
                checked += 1
    assert checked > 20


def test_sides_are_single_tokens(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_file)
    assert [tokenizer.encode(side) for side in SIDES] == [[first_side_id() + i] for i in range(len(SIDES))]


def test_held_out_stills_show_what_is_asked_for() -> None:
    for scene, query in held_out_stills(4):
        assert query.thing is not None and scene.things[query.thing].visible(np.zeros(1)).all()


@pytest.mark.slow
def test_train_text_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped and resumed equals an uninterrupted one; its checkpoint answers in text."""
    monkeypatch.setattr("bridge_stg.demo.text_heads.train.EVALUATED", (1, 1))
    recipe = replace(demo_recipe({"text": 2}, seed=3), validation=Validation(every=1, metric="score"))
    scores = iter([{"score": 0.1}, {"score": 0.2}])
    whole = train_text_demo(tmp_path / "whole", recipe, clips=1, score=lambda _: next(scores))

    def stops(_: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(TrainingStopped) as stopped:
        train_text_demo(tmp_path / "stopped", recipe, clips=1, score=stops)
    assert stopped.value.signal == signal.SIGTERM
    scores = iter([{"score": 0.1}, {"score": 0.2}])
    resumed = train_text_demo(
        tmp_path / "stopped", recipe, clips=1, score=lambda grounder: held_out_scores(grounder) | next(scores)
    )
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()

    scene, query = next(held_out_stills(1))
    model = load_checkpoint(whole)
    with torch_grounder(model) as grounder:
        image = scene.render(np.zeros(1), scene.width, scene.height)[0]
        result = grounder.locate(image, query.text.upper())
        assert (result.heads, result.mode) == ("text", "image") and result.boxes is not None
        assert json.loads(result.answer)[0]["label"] == query.text
    log = [json.loads(line) for line in (tmp_path / "stopped-training" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "validation" in line) for line in log] == [(1, True), (2, False), (2, True)]
    assert log[-1]["validation"].keys() > {"held_out_Acc@0.5", "held_out_vIoU"}

    monkeypatch.delitem(WAYS, "text, two-step")
    monkeypatch.delitem(WAYS, "text, joint, no drafts")
    bridge, text = opened(load_checkpoint(demo_checkpoint())), opened(model)
    figures = compare(bridge, text, clips=1, folder=tmp_path / "clips")
    assert figures["tubes"]["bridge"]["all"]["m_vIoU"] > 0.5 > figures["image"]["mean_IoU"]
    for found in figures["tubes"].values():
        assert len(found) == 2 and found["all"]["clips"] == 1 and found["all"]["calls"] >= 2
    assert figures["tubes"]["text, joint"]["all"]["tokens"] > 0 == figures["tubes"]["bridge"]["all"]["tokens"]
