"""Bundles with text heads, from models as they are downloaded: two graphs, answers as torch gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.cli import app
from bridge_stg.commands.tables import bundle_table
from bridge_stg.evaluation.run.evaluate import bundle_model
from bridge_stg.export.engines.build import build_engines
from bridge_stg.export.engines.profiles import Deployment, profiles_of
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.export.parity.golden_cases import scene
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS, graph_contract
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.parity.golden import read_case
from bridge_stg.runtime.parity.verify import verify_bundle
from bridge_stg.triton.repository import Serving, write_repository
from tests.bridge_stg.checkpoint.plain_folders import FAMILIES, make_plain_folder
from tests.errors import raises
from tests.export.engines.real_tensorrt import rtx

pytestmark = pytest.mark.slow
each_family = pytest.mark.parametrize("family", FAMILIES)
Bundles = Callable[[str], Bundle]
Folders = Callable[[str], Path]


@each_family
def test_two_graphs_without_taps_and_feature_maps(text_bundle: Bundles, family: str) -> None:
    bundle = text_bundle(family)
    spec = bundle.manifest.spec
    assert spec.heads == "text" and spec.text is not None and set(bundle.manifest.graphs) == set(GRAPHS[:2])
    for name, variants in bundle.manifest.graphs.items():
        assert set(variants) == {"standard", "primitive", "ort-cpu"}
        contract = graph_contract(name, spec, variant="standard", opset=24)
        assert variants["standard"].outputs == contract.outputs
    assert "heads        text" in bundle_table(bundle)


@each_family
def test_every_boundary_agrees_with_torch(text_bundle: Bundles, family: str) -> None:
    bundle = text_bundle(family)
    report = read_report(bundle.path, "parity")
    tensors = {row["name"].partition(" ")[0].rpartition(".")[2] for row in report["boundaries"]}
    frames = next(folder for folder in bundle.golden_cases() if folder.name == "frames")
    calls = {call.name: call.load()[0] for call in read_case(frames).calls}
    first, second = calls["language_model_0"], calls["language_model_1"]
    assert first["input_ids"].shape[0] == len(calls["vision_encoder_0"]["frames"]) > 1
    assert len({rows.max() for rows in first["visual_index"]}) == len(first["input_ids"])  # each row sees its frame
    assert not second["visual_index"].any() and len(calls) == 5
    assert any(
        row["name"].startswith("language_model.logits") and "frames/" in row["name"] for row in report["boundaries"]
    )
    assert report["passed"] and tensors == {"visual_tokens", "logits", "kv"}
    assert all(moved > 0.1 for moved in report["dependence"].values()), report["dependence"]
    replayed = verify_bundle(bundle.path, backend="onnxruntime")
    assert set(replayed) == {"standard", "primitive", "ort-cpu"} and all(len(found) > 15 for found in replayed.values())


@each_family
def test_answers_are_those_of_torch(plain_folder: Folders, text_bundle: Bundles, family: str) -> None:
    """Both sides write the same ids, with and without a grammar."""
    reference = torch_grounder(load_checkpoint(plain_folder(family)))
    with Grounder.load(text_bundle(family).path, backend="onnxruntime", threads=1) as grounder:
        assert grounder.heads == "text"
        for ask in (lambda g: "".join(g.ask(scene(), "What moves?", max_tokens=30)),
                    lambda g: g.ground(scene(), "the red square", allow_none=False).answer):  # fmt: skip
            assert ask(grounder) == ask(reference) != ""
        found, expected = (g.ground(scene(), "the red square", allow_none=False) for g in (grounder, reference))
    assert found.tube is not None and expected.tube is not None and found.span == expected.span
    assert found.tube.boxes.tolist() == expected.tube.boxes.tolist()


@pytest.mark.parametrize("family, dtype", [("qwen3_vl", "bf16"), ("qwen2_5_vl", "fp16")])
def test_lower_precisions(tmp_path: Path, family: str, dtype: str) -> None:
    make_plain_folder(tmp_path / "model", family)
    bundle = Bundle.load(export_bundle(tmp_path / "model", tmp_path / "bundle", dtype=dtype), check="all")
    assert {graph.precision for graph in bundle.manifest.all_graphs()} == {dtype}
    assert read_report(bundle.path, "parity")["passed"]


def test_the_command_says_what_it_makes(tmp_path: Path) -> None:
    make_plain_folder(tmp_path / "model", "qwen3_vl", template=False)
    words = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "b"), "--variant", "standard", "--no-verify"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if "text heads" in line)
    assert "qwen3_vl" in line and "two graphs" in line and "no chat template" in line
    assert Bundle.load(tmp_path / "b").manifest.spec.heads == "text"


@each_family
@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_engines_are_built(text_bundle: Bundles, family: str, variant: str, tmp_path: Path) -> None:
    rtx()
    bundle = text_bundle(family)
    small = {"capacity": 512, "vision_encoder": dict.fromkeys(list(profiles_of(
        bundle.graph("vision_encoder", variant), bundle.manifest.spec
    ).profiles)[1:])}  # fmt: skip
    entries = build_engines(bundle, ["rtx-ada"], variant=variant, overrides=small)
    assert {entry.graph for entry in entries} == set(GRAPHS[:2])


def test_decode_profiles_have_room_for_drafts(text_bundle: Bundles) -> None:
    bundle = text_bundle("qwen3_vl")
    made = profiles_of(bundle.graph("language_model", "standard"), bundle.manifest.spec)
    assert made.profiles["decode"]["L"][2] == made.profiles["decode"]["K"][2] == 128
    spec = bundle.manifest.spec
    wide = dataclasses.replace(spec, language=dataclasses.replace(spec.language, max_positions=2**17))
    for frames in (32, 64):
        deployment = Deployment(max_frames=frames)
        assert deployment.positions(wide) >= 64 * frames + deployment.visual_tokens(wide)
    assert made.capacity == Deployment().positions(spec) <= 8192


def test_text_bundles_have_no_bridge_heads(text_bundle: Bundles, tmp_path: Path) -> None:
    path, repository = text_bundle("qwen3_vl").path, tmp_path / "models"
    with raises("bundle.no_heads", "bridge"):
        Grounder.load(path, heads="bridge")
    with raises("bundle.no_heads", "bridge"):  # before a file of results is begun
        bundle_model(path, "model", heads="bridge")
    with raises("bundle.no_heads", "bridge"):
        write_repository(path, repository, Serving(heads="bridge"))
    assert not repository.exists()
