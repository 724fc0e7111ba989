"""Training on annotated clips: labels by the runtime's rules, resumable to the bit, and errors that name the fault."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from bridge_stg.checkpoint.safetensors_file import read_header
from bridge_stg.model.backbones import FAMILIES
from bridge_stg.model.config import BridgingConfig, SpatialDecoderConfig
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.chain.decode import prefill_video
from bridge_stg.runtime.chain.vision_pass import coarse_tokens, fine_maps
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.training.data.clips import ClipBatch, ClipBatches
from bridge_stg.training.data.index import check_clips
from bridge_stg.training.data.mixture import Mixture
from bridge_stg.training.data.sources import read_clips
from bridge_stg.training.folder import locked_run
from bridge_stg.training.loop.distribution import Processes
from bridge_stg.training.loop.state import load_state
from bridge_stg.training.loop.trainer import TrainingStopped
from bridge_stg.training.loss.clip_task import ClipTask
from bridge_stg.training.loss.losses import heat_target
from bridge_stg.training.parts import part_of
from bridge_stg.training.recipe import PARTS, DataRecipe, Lora, Source, Stage, TrainingRecipe, Validation
from bridge_stg.training.train_checkpoint import train_checkpoint
from tests.bridge_stg.model.published import publish
from tests.bridge_stg.training.small import LINES, annotate, shrink_frames
from tests.errors import raises
from tests.fakes.clips import write

SIZE = (96, 64)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    pictures = np.random.default_rng(0).integers(0, 255, (30, 8, 12, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    write(folder / "a.mp4", list(pictures), rate=10)
    Image.fromarray(pictures[0]).save(folder / "b.png")
    return folder


@pytest.fixture
def annotations(tmp_path) -> Path:
    return annotate(tmp_path / "clips.jsonl")


def make_checkpoint(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    publish(folder / "model", family, dtype=dtype)
    out = init_checkpoint(
        folder / "model", folder / "checkpoint", bridging=BridgingConfig(num_queries=2, tapped_layers=(0, 2)),
        spatial_decoder=SpatialDecoderConfig(width=32, num_layers=2, num_heads=2, ffn_width=64),
    )  # fmt: skip
    shrink_frames(out)
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), "qwen3_vl")


@pytest.fixture(scope="module")
def model(checkpoint) -> BridgeSTG:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module", params=FAMILIES)
def of_each_family(request, tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def video_batch(model: BridgeSTG, checkpoint: Path, annotations: Path, media: Path, **options: Any) -> ClipBatch:
    """Return the first clip of the annotations."""
    sources = [Source(annotations=(str(annotations),), media=str(media))]
    index = check_clips(read_clips(sources)[:1], sources, model.spec)
    mixture = Mixture(index, DataRecipe(**{"fine_frames": 6, **options}), 0, 0, 1)
    return ClipBatches(model.spec, checkpoint / "tokenizer.json", mixture).batch(0)


def test_the_forward_pass_is_that_of_the_chain(of_each_family, annotations, media):
    model = load_checkpoint(of_each_family)
    batch = video_batch(model, of_each_family, annotations, media, fine_frames=100)
    task = ClipTask(model, bf16=False)
    with torch.no_grad():
        suffix = task.language(batch, task.visual_tokens(batch.frames), batch.input_ids)
        taps = task.taps(batch, suffix)
        feature_map = task.feature_map(batch.fine)
        found = model.spatial_decoder.localize(feature_map[None], taps, batch.fine_times[None], batch.mask[None])
    sessions = {name: TorchSession(name, model) for name in GRAPHS}
    vision, language, decoder = (sessions[n] for n in ("vision_encoder", "language_model", "spatial_decoder"))
    tokens = coarse_tokens(vision, model.spec, batch.frames.numpy(), report=Limits().report)
    cache = language.allocate_cache(batch=1, capacity=len(batch.prefix) + batch.input_ids.shape[1])
    prefix = prefill_video(language, cache, batch.prefix, tokens, report=Limits().report)
    maps = fine_maps(vision, model.spec, batch.fine.numpy(), report=Limits().report)
    for row, length in enumerate(batch.length.tolist()):
        places = np.arange(length)
        feeds = {
            "input_ids": batch.input_ids[row : row + 1, :length].numpy(),
            "visual_index": np.zeros((1, length), np.int64),
            "visual_tokens": prefix.no_visual_tokens,
            "positions": np.broadcast_to(prefix.next_position + places, (3, 1, length)),
            "cache_position": np.array([prefix.length]),
            "output_index": places[None, -2:],
        }
        asked = language.infer(feeds, cache=cache)["taps"]
        np.testing.assert_allclose(taps[:, 0, row : row + 1], asked, atol=2e-4)
        times, mask = batch.fine_times.numpy(), batch.mask[row : row + 1].numpy()
        feeds = {"feature_map": maps, "taps": asked, "frame_times": times, "frame_mask": mask}
        boxes = decoder.infer(feeds)["boxes"][0]
        np.testing.assert_allclose(found.boxes[-1][0, row][mask[0]], boxes[mask[0]], atol=2e-4)


def test_everything_is_computed_on_the_models_device(of_each_family, annotations, media):
    """On `meta`, which mixes with no other device: what works there works on CUDA."""
    meta = torch.device("meta")
    model = load_checkpoint(of_each_family, attention="sdpa").to(meta)
    batch = video_batch(model, of_each_family, annotations, media)
    task = ClipTask(model)
    with meta:
        suffix = task.language(batch, task.visual_tokens(task.to_device(batch.frames)), task.to_device(batch.input_ids))
        found = model.spatial_decoder.localize(
            task.feature_map(task.to_device(batch.fine))[None], task.taps(batch, suffix),
            task.to_device(batch.fine_times)[None], task.to_device(batch.mask)[None],
        )  # fmt: skip
        assert heat_target(found.boxes[-1], 3, 4).device == meta
    assert {t.device for t in (*suffix, *found.boxes, *found.presence, found.heat, found.summary)} == {meta}


def test_the_attention_of_cuda_is_that_of_the_cpu(of_each_family, annotations, media):
    figures = []
    for attention in (None, "sdpa"):
        model = load_checkpoint(of_each_family, attention=attention)
        batch = video_batch(model, of_each_family, annotations, media)
        with torch.no_grad():
            figures.append(ClipTask(model, bf16=False)(batch)[1])
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


NOTHING = {"absent": (LINES[1], ["presence"]), "when alone": ({**LINES[2], "span": [0.0, 9.0]}, [])}


@pytest.mark.parametrize("name", NOTHING)
def test_clips_without_boxes_have_a_finite_loss(model, checkpoint, tmp_path, media, name):
    line, parts = NOTHING[name]
    batch = video_batch(model, checkpoint, annotate(tmp_path / "n.jsonl", [line]), media)
    value, figures = ClipTask(model)(batch)
    assert torch.isfinite(value)
    assert set(figures) == {"language", "token_accuracy", *parts, *(f"{part}_accuracy" for part in parts)}


def recipe_of(annotations: Path, media: Path, *, data: dict[str, Any] | None = None, **options: Any) -> TrainingRecipe:
    """Return a recipe with one stage, of these options or those of all stages."""
    whole = {name: options.pop(name) for name in ("seed", "validation", "save_every_s") if name in options}
    stage = Stage(**{"name": "only", "steps": 4, "clips": 1, "learning_rate": 1e-3, "warmup": 1, **options})
    source = Source((str(annotations),), media=str(media))
    chosen = DataRecipe(**{"sources": (source,), "fine_frames": 6, "max_broken": 0.0, **(data or {})})
    return TrainingRecipe((stage,), chosen, precision="fp32", **whole)


def run(checkpoint: Path, annotations: Path, media: Path, out: Path, **options: Any) -> Path:
    more = {name: options.pop(name) for name in ("device", "resume", "dtype") if name in options}
    recipe = recipe_of(annotations, media, **options)
    return train_checkpoint(checkpoint, out, recipe, workers=0, **{"device": "cpu", **more})


def changed_parts(before: BridgeSTG, after: BridgeSTG) -> set[str]:
    pairs = zip(before.named_parameters(), after.parameters())
    return {part_of(name) for (name, first), second in pairs if not torch.equal(first, second)}


@pytest.mark.parametrize("parts", [PARTS[:-1], ("bridging", "spatial"), PARTS], ids=["default", "frozen", "all"])
def test_only_the_chosen_parts_are_trained(of_each_family, annotations, media, tmp_path, parts):
    out = run(of_each_family, annotations, media, tmp_path / "new", train=parts, rates={"llm": 10.0})
    model, trained = load_checkpoint(of_each_family), load_checkpoint(out)
    assert changed_parts(model, trained) == set(parts)
    assert not model.config.trained and trained.config == dataclasses.replace(model.config, trained=True)
    assert {tensor.dtype for tensor in read_header(out / "model.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in read_header(out / "spatial_decoder.safetensors").values()} == {torch.float32}
    log = [json.loads(line) for line in (tmp_path / "new-training" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4 and {"language", "l1", "giou", "heat", "presence", "iou"} <= set(log[-1])


def test_a_resumed_run_equals_an_uninterrupted_one(checkpoint, annotations, media, tmp_path, monkeypatch):
    options = {"lora": Lora(rank=2, dropout=0.1), "ema": 0.9, "checkpoint_activations": True}
    whole = run(checkpoint, annotations, media, tmp_path / "whole", **options)
    calls = iter(range(10))
    forward = ClipTask.forward

    def stop(self: ClipTask, batch: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    monkeypatch.setattr(ClipTask, "forward", stop)
    with pytest.raises(TrainingStopped):
        run(checkpoint, annotations, media, tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(ClipTask, "forward", forward)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-2:] = b"\0\0"
    (other / "model.safetensors").write_bytes(content)
    with raises("training.other_options", "run.json", "weights"):
        run(other, annotations, media, tmp_path / "killed", **options)
    with raises("training.other_options", "run.json", "seed"):
        run(checkpoint, annotations, media, tmp_path / "killed", seed=1, **options)
    with raises("training.other_options", "run.json", "annotations"):
        run(checkpoint, annotate(tmp_path / "b.jsonl", LINES[:1]), media, tmp_path / "killed", **options)
    resumed = run(checkpoint, annotations, media, tmp_path / "killed", **options)
    for name in ("bridging", "spatial_decoder", "adapter/adapter_model"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (whole, resumed))
        assert first and all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_full_disk_is_detected_before_the_training(checkpoint, annotations, media, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with raises("output.disk_full", tmp_path / "new", "0 MB"):
        run(checkpoint, annotations, media, tmp_path / "new")
    assert not (tmp_path / "new-training" / "log.jsonl").exists()


def test_the_folder_of_a_training_is_that_of_one_training(checkpoint, annotations, media, tmp_path):
    out, folder = tmp_path / "new", tmp_path / "new-training"
    folder.mkdir()
    (folder / "mine.jsonl").write_text("mine")
    for resume in (True, False):
        with raises("output.exists", folder, "mine.jsonl"):
            run(checkpoint, annotations, media, out, resume=resume)
    assert [path.name for path in folder.iterdir()] == ["mine.jsonl"]
    shutil.rmtree(folder)
    with locked_run(folder, {}, resume=True), raises("output.in_use", folder):
        run(checkpoint, annotations, media, out)
    assert {path.name for path in folder.iterdir()} == {"run.json", "lock"}


def test_paths_that_cannot_be_written_at_the_end_are_rejected_at_once(checkpoint, annotations, media, tmp_path):
    own = tmp_path / "own-training" / "parts"
    shutil.copytree(checkpoint, own)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for given, out, code in (
        (checkpoint, checkpoint / "new", "output.is_input"), (own, tmp_path / "own", "output.is_input"),
        (checkpoint, tmp_path / "link", "output.exists"), (checkpoint, tmp_path / "none" / "..", "output.exists"),
    ):  # fmt: skip
        with raises(code, out):
            run(given, annotations, media, out, resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {"own-training", "link", "clips.jsonl"}
    assert len(list(own.iterdir())) == len(list(checkpoint.iterdir()))


def test_starting_again_resumes_nothing_of_the_old_training(checkpoint, annotations, media, tmp_path, monkeypatch):
    recipe = recipe_of(annotations, media, steps=1, lora=Lora(rank=2))
    stages = (dataclasses.replace(recipe.stages[0], name="first"), dataclasses.replace(recipe.stages[0], lora=None))
    recipe, folder = dataclasses.replace(recipe, stages=stages), tmp_path / "new-training"
    out = train_checkpoint(checkpoint, tmp_path / "new", recipe, workers=0, device="cpu")
    shutil.rmtree(out)
    assert (folder / "first" / "adapter").is_dir()

    def stop(self: ClipTask, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ClipTask, "forward", stop)
        with pytest.raises(TrainingStopped):
            train_checkpoint(checkpoint, out, recipe, workers=0, device="cpu", resume=False)
    assert not (folder / "first").exists() and not (folder / "log.jsonl").exists()
    train_checkpoint(checkpoint, out, recipe, workers=0, device="cpu")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in log] == ["first", "only"]


def test_an_output_that_appears_meanwhile_is_kept_and_a_damaged_stage_is_written_again(
    checkpoint, annotations, media, tmp_path, monkeypatch
):
    recipe, out = recipe_of(annotations, media, steps=1, lora=Lora(rank=2)), tmp_path / "new"
    stages = (dataclasses.replace(recipe.stages[0], name="first"), recipe.stages[0])
    recipe, forward = dataclasses.replace(recipe, stages=stages), ClipTask.forward

    def appear(self: ClipTask, batch: Any) -> Any:
        out.mkdir(exist_ok=True)
        return forward(self, batch)

    monkeypatch.setattr(ClipTask, "forward", appear)
    with raises("output.exists", out):
        train_checkpoint(checkpoint, out, recipe, workers=0, device="cpu")
    assert not list(out.iterdir())
    out.rmdir()
    first = tmp_path / "new-training" / "first"
    (first / "config.json").unlink()
    assert (first / "adapter").is_dir()
    train_checkpoint(checkpoint, out, recipe, workers=0, device="cpu")
    assert load_checkpoint(first).spec.trained and load_checkpoint(out).spec.trained


def test_a_clip_can_be_learned(checkpoint, tmp_path, media):
    annotations = annotate(tmp_path / "clips.jsonl", LINES[:2])
    out = run(checkpoint, annotations, media, tmp_path / "new", train=PARTS[:-1], steps=40, learning_rate=1e-2)
    figures = []
    for folder in (checkpoint, out):
        model = load_checkpoint(folder)
        batch = video_batch(model, checkpoint, annotations, media, fine_frames=100)
        with torch.no_grad():
            figures.append(ClipTask(model, bf16=False)(batch)[1])
    before, after = figures
    assert after["language"] < 0.3 * before["language"] and after["iou"] > before["iou"] + 0.3


def test_tracking_in_an_image_has_no_language_loss(model, checkpoint, tmp_path, media):
    annotations = annotate(tmp_path / "clips.jsonl", LINES[3:])
    batch = video_batch(model, checkpoint, annotations, media, tracked=1.0)
    assert batch.target.max() < 0
    value, figures = ClipTask(model)(batch)
    assert torch.isfinite(value) and "l1" in figures and "language" not in figures


FAULTS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "a missing video": ({"video": "z.mp4"}, "missing_media", ["z.mp4"]),
    "a box outside": (
        {"boxes": [{"time": 1, "box": [97, 0, 98, 9]}]}, "bad_field", ["'boxes'", "[97", "96 × 64"]
    ),
    "a query of nothing": ({"query": "?"}, "bad_field", ["'query'"]),
    "a span in milliseconds": ({"span": [1000, 2500]}, "bad_field", ["'span'", "1000 s", "3.00 s"]),
    "a span without its end": ({"span": [1]}, "bad_field", ["'span'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_annotations_are_named(checkpoint, media, tmp_path, name):
    change, code, values = FAULTS[name]
    lines = [LINES[0], {**LINES[0], **change}]
    with raises(f"annotation.{code}", "clips.jsonl:2", *values):
        run(checkpoint, annotate(tmp_path / "clips.jsonl", lines), media, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_error_of_a_worker_process_keeps_its_message(checkpoint, media, tmp_path, monkeypatch):
    video = tmp_path / "a.mp4"
    shutil.copy(media / "a.mp4", video)

    def check_and_damage(*args: Any, **options: Any) -> Any:
        index = check_clips(*args, **options)
        video.write_bytes(b"damaged")
        return index

    monkeypatch.setattr("bridge_stg.training.train_checkpoint.check_clips", check_and_damage)
    with raises("annotation.broken_media", video) as caught:
        recipe = recipe_of(annotate(tmp_path / "clips.jsonl", LINES[:1]), tmp_path)
        train_checkpoint(checkpoint, tmp_path / "new", recipe, workers=1, device="cpu")
    assert "Traceback" not in str(caught.value)


def test_invalid_options_are_rejected_at_once(checkpoint, annotations, media, tmp_path):
    with raises("training.no_device", "--device cuda:77"):
        run(checkpoint, annotations, media, tmp_path / "new", device="cuda:77")
    with raises("training.bad_recipe", "llm", "nothing_proj"):
        run(checkpoint, annotations, media, tmp_path / "new", lora=Lora(modules=("nothing_proj",)))
    with raises("training.bad_recipe", "vision", "qkv"):
        run(checkpoint, annotations, media, tmp_path / "new", lora=Lora(parts=("llm", "vision")))
    recipe = recipe_of(annotations, media)
    later = dataclasses.replace(recipe.stages[0], name="later", optimizer="adamw8bit")
    with raises("training.no_bitsandbytes", "later"):
        recipe = dataclasses.replace(recipe, stages=(*recipe.stages, later))
        train_checkpoint(checkpoint, tmp_path / "new", recipe, workers=0, device="cpu")
    assert not (tmp_path / "new-training").exists()
    with raises("training.bad_recipe", "data.sources", "--annotations"):
        run(checkpoint, annotations, media, tmp_path / "new", data={"sources": ()})
    with raises("annotation.no_media_folder", tmp_path / "nowhere"):
        run(checkpoint, annotations, tmp_path / "nowhere", tmp_path / "new")
    (tmp_path / "new").mkdir()
    with raises("output.exists", tmp_path / "new"):
        run(checkpoint, annotations, media, tmp_path / "new")


@pytest.mark.parametrize(
    "content", [b"", b"\x10" * 99, (2**60).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"{}"]
)
def test_a_damaged_state_is_not_resumed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").write_bytes(content)
    with raises("training.wrong_state", tmp_path / "state", "--no-resume"):
        load_state(tmp_path / "state", {}, torch.optim.AdamW([torch.zeros(1)]), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_is_the_trained_model(family, annotations, media, tmp_path, monkeypatch):
    """The eager model at the end of the training has the outputs of its checkpoint, and the backbone is unchanged."""
    kept = []
    distribute = Processes.distribute
    monkeypatch.setattr(Processes, "distribute", lambda *args: kept.append(args[1]) or distribute(*args))
    checkpoint = make_checkpoint(tmp_path, family, torch.float32)
    lora = Lora(rank=4, alpha=64.0, rslora=True)
    out = run(checkpoint, annotations, media, tmp_path / "new", lora=lora, learning_rate=1e-2)
    assert (out / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert all(file.stat().st_mode & 0o044 for file in (out / "adapter").glob("*.safetensors"))  # others may read it
    batch = video_batch(load_checkpoint(out), out, annotations, media)
    figures = []
    for model in (kept[0].model, load_checkpoint(out), load_checkpoint(checkpoint)):
        with torch.no_grad():
            figures.append(ClipTask(model.eval(), bf16=False)(batch)[1]["language"])
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)
    assert abs(figures[2] - figures[1]) > 0.01


def test_recomputed_activations_have_the_same_gradients(of_each_family, annotations, media):
    gradients = []
    for recompute in (False, True):
        model = load_checkpoint(of_each_family).train()
        for part in (model.language_model, model.vision_encoder):
            part.checkpoint_activations = recompute
        ClipTask(model, bf16=False)(video_batch(model, of_each_family, annotations, media))[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    assert all(torch.allclose(value, gradients[1][name], atol=1e-6) for name, value in gradients[0].items())


def test_stages_follow_each_other_with_validation_and_a_report(checkpoint, annotations, media, tmp_path):
    source = Source((str(annotations),), media=str(media))
    recipe = TrainingRecipe(
        (
            Stage("parts", 2, clips=2),
            Stage("lora", 2, clips=2, lora=Lora(rank=2)),
            Stage("all", 2, clips=2, train=PARTS, ema=0.9),
        ),
        DataRecipe((source,), fine_frames=4),
        Validation((source,), samples=4, every=1),
    )
    with raises("training.no_tracker", "wandb"):
        train_checkpoint(checkpoint, tmp_path / "new", recipe, device="cpu", tracker="wandb")
    out = train_checkpoint(checkpoint, tmp_path / "new", recipe, workers=0, device="cpu", tracker="tensorboard")
    folder = tmp_path / "new-training"
    assert next(folder.rglob("events.out.tfevents*")).stat().st_size > 500
    assert (folder / "lora" / "adapter" / "adapter_config.json").is_file() and not (out / "adapter").exists()
    assert changed_parts(load_checkpoint(folder / "lora"), load_checkpoint(out)) == set(PARTS)
    assert "<svg" in (folder / "train_report.html").read_text()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log if "validation" in line] == [
        (stage, step) for stage in ("parts", "lora", "all") for step in (1, 2)
    ]
    assert read_header(folder / "all.best.safetensors")
