"""`verify --bisect` on a TensorRT backend: engines of tapped graphs are built like the bundle's own, and do not stay.

TensorRT and the GPU are pretended (tests/runtime), up to the last test; the fault is one that a compiler put in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from bridge_stg.cli import run
from bridge_stg.export.engines import bisect_engines as tapped_engines
from bridge_stg.export.engines import build as engine_build
from bridge_stg.export.engines import build_plan as engine_choice
from bridge_stg.export.engines.bisect_engines import build_like, engine_maker
from bridge_stg.export.engines.compile import Compiled
from bridge_stg.export.parity import block_outputs as taps
from bridge_stg.export.parity.bisect import Side
from bridge_stg.runtime.backends.tensorrt.engine_cache import EngineEntry, read_engines
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import TensorSpec
from bridge_stg.runtime.errors import EngineError
from tests.export.parity.test_bisect import damage
from tests.fakes.machine import VERSION, FakeMachine
from tests.fakes.tensorrt import make_plan

GRAPH, WEIGHT = "language_model", "model.language_model.layers.2.self_attn.o_proj.weight"
BLOCK = "language_model.layers.2.self_attn"
BACKENDS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


class Compiler:
    """A pretended TensorRT that compiles one graph's variant wrong, on a pretended GPU.

    Attributes:
        calls: what was compiled: path, profiles and options.
        installed: the families that can be imported.
        refuses: raised instead of compiling.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, family: str, wrong: str) -> None:
        self.machine = FakeMachine(monkeypatch, folder / "cache", family=family, eager=())
        self.folder, self.wrong = folder / "compiled", wrong
        self.calls: list[dict[str, Any]] = []
        self.installed = {family}
        self.refuses: BaseException | None = None
        device = SimpleNamespace(sm=87, memory=8 * 10**9)
        monkeypatch.setattr(engine_choice, "machine", lambda: SimpleNamespace(devices=(device,), device_problem=None))
        monkeypatch.setattr(engine_choice, "load_tensorrt", self.load)
        monkeypatch.setattr(tapped_engines, "load_tensorrt", self.load)
        monkeypatch.setattr(engine_build, "compile_graph", self.compile)

    def load(self, family: str) -> Any:
        if family not in self.installed:
            raise EngineError(f"{family} is not installed")
        return SimpleNamespace(__version__=VERSION, family=family)

    def compile(self, tensorrt: Any, path: Path, profiles: Mapping[str, Any], **options: Any) -> Compiled:
        self.calls.append({"path": path, "profiles": profiles, "family": tensorrt.family, **options})
        if options["report"] is not None:
            options["report"]("Building", 1, 2)
        if self.refuses is not None:
            raise self.refuses
        place = self.folder / str(len(self.calls))
        shutil.copytree(path.parent, place, copy_function=os.link)
        made = place / path.name
        if (path.parent.name, path.stem) == (GRAPH, self.wrong):
            made.unlink()
            shutil.copyfile(path, made)
            damage(made, WEIGHT, place)
        sizes = {"h": "height // 16", "w": "width // 16"} if path.parent.name == "vision_encoder" else {}
        capacity = options["capacity"]
        return Compiled(make_plan(made, as_spec(path), list(profiles.values()), capacity=capacity, sizes=sizes), b"")


def as_spec(path: Path) -> Any:
    """What the manifest says of a graph, read from the graph."""
    graph = onnx.load(path, load_external_data=False).graph

    def tensors(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    inputs, outputs = tensors(graph.input), tensors(graph.output)
    past = tuple(tensor.name for tensor in inputs if tensor.name.startswith("past_"))
    written = tuple(tensor.name for tensor in outputs if tensor.name.startswith(("present_", "new_")))
    update = "in_place" if any(name.startswith("present_") for name in written) else "append"
    cache = SimpleNamespace(update=update, past_names=past, written_names=written) if past else None
    return SimpleNamespace(inputs=inputs, outputs=outputs, cache=cache)


@pytest.fixture
def bundle(exported: Bundle, tmp_path: Path) -> Bundle:
    """The tiny bundle in a place of its own."""
    shutil.copytree(exported.path, tmp_path / "place" / "b", ignore=shutil.ignore_patterns("engines"))
    return Bundle.load(tmp_path / "place" / "b")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], Compiler]:
    return lambda family, wrong: Compiler(monkeypatch, tmp_path, family, wrong)


def files(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.name != "kernels.bin"}


@pytest.mark.parametrize("family", list(BACKENDS))
def test_a_block_that_is_compiled_wrong_is_named(
    bundle: Bundle, compiler: Any, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended = compiler(family, "standard")
    profiles = tmp_path / "profiles.yaml"
    profiles.write_text("capacity: 1024\nlanguage_model: {wide: {B: 4, L: 256, K: [1, 1, 8], V: [2, 64, 2048]}}\n")
    assert run(["build", str(bundle.path), "--target", "this", "--profiles", str(profiles)]) == 0
    own = {entry.graph: entry for entry in read_engines(bundle)}
    before, count = files(tmp_path / "place", tmp_path / "cache"), len(pretended.calls)
    pretended.installed = set(BACKENDS)  # the bundle's engine decides which of them it is
    capsys.readouterr()
    backend = BACKENDS[family]
    assert run(["verify", str(bundle.path), "--backend", backend, "--variant", "standard", "--bisect"]) == 2
    shown = capsys.readouterr()
    (told,) = [line for line in shown.err.splitlines() if line.startswith("Error: ")]
    assert f"begins in {BLOCK}" in told and "on onnxruntime" in told
    tapped = pretended.calls[count:]
    assert len(tapped) == 2  # blocks, and what is inside of one
    for call in tapped:
        assert call["path"].name == "standard.onnx" and bundle.path not in call["path"].parents
        assert call["profiles"] == own[GRAPH].profiles and "wide" in call["profiles"] and call["capacity"] == 1024
        assert call["family"] == family and call["report"] is not None
    assert files(tmp_path / "place", tmp_path / "cache") == before
    assert not pretended.machine.cuda.allocations


def test_the_reference_may_be_an_engine_too(
    bundle: Bundle, compiler: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended = compiler("tensorrt", "primitive")
    for variant in ("standard", "primitive"):
        assert run(["build", str(bundle.path), "--target", "this", "--variant", variant]) == 0
    before, count = files(tmp_path / "place", tmp_path / "cache"), len(pretended.calls)
    capsys.readouterr()
    assert run(["verify", str(bundle.path), "--bisect"]) == 2  # tensorrt is what "auto" takes here
    told = capsys.readouterr().err
    assert f"begins in {BLOCK}" in told and f"{GRAPH} (standard) of {bundle.path} on tensorrt" in told
    assert sorted(call["path"].stem for call in pretended.calls[count:]) == ["primitive"] * 2 + ["standard"] * 2
    assert files(tmp_path / "place", tmp_path / "cache") == before


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (EngineError("no room for the taps"), 2, "that cannot be built: no room for the taps"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
    ids=["refused", "interrupted"],
)  # fmt: skip
def test_what_cannot_be_built_leaves_nothing(
    bundle: Bundle, compiler: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    problem: BaseException, code: int, message: str,
) -> None:  # fmt: skip
    pretended = compiler("tensorrt", "standard")
    assert run(["build", str(bundle.path), "--target", "this"]) == 0
    before = files(tmp_path / "place", tmp_path / "cache")
    pretended.refuses = problem
    capsys.readouterr()
    assert run(["verify", str(bundle.path), "--backend", "tensorrt", "--variant", "standard", "--bisect"]) == code
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    if code == 2:
        assert "logits drifts, and in which block that begins cannot be told" in told
    assert files(tmp_path / "place", tmp_path / "cache") == before


def test_a_backend_that_runs_graphs_needs_none(bundle: Bundle, compiler: Any) -> None:
    pretended = compiler("tensorrt", "standard")
    engine_maker()(Side(bundle, GRAPH, "standard", "onnxruntime"), bundle)
    assert not pretended.calls


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_a_real_tensorrt_compiles_tapped_graphs(
    exported_fp16: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Background of time, as `rtx-ampere`; nothing is run, which takes the GPU."""
    pytest.importorskip("tensorrt_rtx_bindings", reason='no TensorRT-RTX: pip install "bridge-stg[rtx]" to run this')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(exported_fp16.path, tmp_path / "b")
    bundle = Bundle.load(tmp_path / "b")
    overrides = {"capacity": 512, "language_model": {"prefill": None}}
    options: dict[str, Any] = {"graphs": [GRAPH], "variant": variant, "overrides": overrides}
    (own,) = engine_build.build_engines(bundle, ["rtx-ampere"], **options)
    borders = taps.borders(bundle.graph_path(GRAPH, variant))
    tapped = taps.write_tapped(bundle, GRAPH, variant, borders, tmp_path / "tapped")
    made: EngineEntry = build_like(own, tapped)
    assert made.plan.is_relative_to(tmp_path / "tapped") and made.read_plan()
    assert (made.profiles, made.capacity, made.key.sms) == (own.profiles, own.capacity, own.key.sms)
    assert len(made.outputs) == len(own.outputs) + len(borders) and len(borders) > 20
    assert read_engines(bundle) == [own]
