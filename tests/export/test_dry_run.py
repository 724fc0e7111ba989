"""`build --dry-run`: what the engines of a model need on a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bridge_stg.commands.build import build
from bridge_stg.export.engines.compile import Compiled
from bridge_stg.export.engines.profiles import Deployment
from bridge_stg.export.estimate import builder_figures
from bridge_stg.export.estimate.activations import FITTED
from bridge_stg.export.estimate.builder_figures import BuilderFigures
from bridge_stg.export.estimate.dry_run import device_of, dry_run
from bridge_stg.export.estimate.shapes import read_shape, shape_of_bundle
from bridge_stg.runtime.bundle.bundle import Bundle
from tests.errors import raises

GB = 10**9


@pytest.mark.parametrize("heads", ["bridge", "text"])
@pytest.mark.parametrize(
    ("model", "target", "dtype", "fits"),
    [
        ("qwen3-vl-2b", "orin-nano-8g", "int4", ("bridge", "text")),
        ("qwen3-vl-2b", "orin-nano-8g", "int8", ("bridge", "text")),
        ("qwen3-vl-2b", "orin-nano-8g", "fp16", ()),  # it runs, but cannot be built there
        ("qwen3-vl-4b", "orin-nx-16g", "int4", ("bridge", "text")),
        ("qwen3-vl-4b", "orin-nano-8g", "fp16", ()),
        ("qwen3-vl-2b", "orin-nano-4g", "fp16", ()),
        ("qwen3-vl-8b", "thor", "fp16", ("bridge", "text")),
    ],
)
def test_published_models_with_32_frames(
    model: str, target: str, dtype: str, heads: str, *, fits: tuple[str, ...]
) -> None:
    shape, deployment = read_shape(model, heads=heads), Deployment(max_frames=32, max_queries=1)
    found = dry_run(shape, device_of(target), deployment, dtype=dtype)
    assert found.fits == (heads in fits)
    assert len(found.graphs) == (3 if heads == "bridge" else 2)
    assert found.needed > sum(graph.plan for graph in found.graphs) + found.activations + found.kv_cache
    many = dry_run(shape, device_of(target), Deployment(max_frames=32), dtype=dtype, queries=8)
    assert many.kv_cache == 9 * found.kv_cache and found.most_queries == int(found.needed <= found.device.usable)
    assert (many.most_queries == 8) == (many.needed <= many.device.usable)
    assert ("the maximum of these engines" in many.table()) == (many.most_queries == 8)


def test_activations_are_those_of_the_builder() -> None:
    found = json.loads(Path("benchmarks/results/activations.json").read_text(encoding="utf-8"))
    assert found["fitted"] == {name: list(stages) for name, stages in FITTED.items()}
    held_out = {name: [] for name in FITTED}
    for row in found["errors"]:
        if row["held_out"] and row["width"] != "demo":
            held_out[f"{row['graph']} {row['variant']} {row['dtype']}"].append(abs(row["error"]))
    assert all(errors and max(errors) <= 0.15 for errors in held_out.values())
    assert max(abs(row["error"]) for row in found["plans"] if row["dtype"] != "int8") <= 0.15
    page = Path("docs/engines.md").read_text(encoding="utf-8")
    for name, errors in held_out.items():
        graph, variant, floats = name.split()
        worst = f"{max(errors):.1%}".replace("%", " %")
        assert f"| `{graph}` | `{variant}` | {floats} | {len(errors)} | {worst} |" in page


@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_engines_of_the_demo_in_fp32(variant: str) -> None:
    found = json.loads(Path("benchmarks/results/activations.json").read_text(encoding="utf-8"))
    shape = read_shape("assets/demo/checkpoint")
    counted = dry_run(shape, device_of("rtx4090"), Deployment(), dtype="fp32", variant=variant).graphs
    assert len(counted) == 3
    for graph in counted:
        where = {"width": "demo", "dtype": "fp32", "graph": graph.graph, "variant": variant}
        rows = [row for row in found["figures"] if where.items() <= row.items()]
        assert graph.activations == pytest.approx(max(row["bytes"] for row in rows), rel=0.15)
        assert graph.plan == pytest.approx(rows[0]["plan"], rel=0.15)


def test_profiles_by_need_take_a_fraction_of_the_former_memory() -> None:
    shape, device = read_shape("qwen3-vl-2b", heads="bridge"), device_of("orin-nano-8g")
    overrides = {"capacity": 9728, "language_model": {"prefill": {"B": [1, 1, 8], "L": [1, 512, 1024]}}}
    before = dry_run(shape, device, Deployment(), dtype="fp16", overrides=overrides)
    after = dry_run(shape, device, Deployment(max_frames=32, max_queries=1), dtype="fp16")
    assert before.activations > 8 * GB and not before.fits
    assert after.activations < 0.2 * before.activations and before.kv_cache > 3 * after.kv_cache


def test_a_bundle_is_counted_by_its_files(exported: Bundle) -> None:
    found = dry_run(shape_of_bundle(exported), device_of("rtx4090"), Deployment(max_frames=8), bundle=exported)
    assert {graph.variant for graph in found.graphs} == {"standard"} and found.fits
    for graph in found.graphs:
        assert graph.weights == sum(file.size for file in exported.graph(graph.graph, "standard").data)
        assert (graph.precision, graph.figures) == ("fp32", "model")


def test_figures_of_the_builder_are_kept(exported: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[Any] = []

    def compile_graph(tensorrt: Any, path: Any, profiles: Any, **options: Any) -> Compiled:
        compiled.append(options["sms"])
        return Compiled(b"", None, (7 * GB, GB))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builder_figures, "compile_graph", compile_graph)
    monkeypatch.setattr(builder_figures, "load_tensorrt", lambda family: pytest)
    shape, device = shape_of_bundle(exported), device_of("orin-nano-8g")
    for _ in range(2):
        found = dry_run(shape, device, Deployment(), bundle=exported, builder=BuilderFigures())
        assert found.activations == 7 * GB and {graph.figures for graph in found.graphs} == {"builder"}
    assert compiled == [(86,)] * 3


def test_the_command_says_whether_it_fits() -> None:
    options = ["qwen3-vl-4b", "--dry-run", "--target", "orin-nano-8g", "--max-frames", "32", "--max-queries", "2"]
    done = CliRunner().invoke(build, [*options, "--dtype", "int4", "--json"], standalone_mode=False)
    (found,) = json.loads(done.output)["dry_runs"]
    assert found["queries"] == 2 and found["graphs"][1]["cache_row"] * 3 == found["memory"]["kv_cache"]
    assert (done.return_value == 0) == found["fits"]
    done = CliRunner().invoke(build, [*options, "--dtype", "fp16"], standalone_mode=False)
    assert done.return_value == 3 and "does not fit" in done.output


def test_frames_beyond_those_of_the_model_are_said() -> None:
    options = ["qwen3-vl-2b", "--dry-run", "--target", "orin-nano-8g", "--max-frames"]
    least, most = (CliRunner().invoke(build, [*options, str(frames)]).output for frames in (128, 2**31 - 1))
    assert "128 frames," in least and f"128 frames (the model's limit; {2**31 - 1} requested)," in most
    assert least.splitlines()[1:] == most.splitlines()[1:]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--dtype", "int4"], "options.conflict"),
        (["--figures", "model"], "options.conflict"),
        (["--dry-run", "--figures", "builder"], "options.conflict"),
        (["--dry-run", "--graph", "vision_encoder"], "options.conflict"),
        (["--dry-run", "--target", "orin"], "options.invalid"),
        (["--dry-run", "--target", "cpu"], "options.invalid"),
        (["--dry-run", "--target", "this"], "options.invalid"),
        (["--dry-run", "--dtype", "int3"], "options.invalid"),
        (["--dry-run", "--variant", "ort-cpu"], "options.invalid"),
    ],
)
def test_misuse(options: list[str], code: str) -> None:
    with raises(code):
        CliRunner().invoke(
            build, ["qwen3-vl-2b", "--target", "orin-nano-8g", *options], standalone_mode=False, catch_exceptions=False
        )
