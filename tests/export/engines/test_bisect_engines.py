"""`verify --bisect` on a TensorRT backend: engines with block outputs are built like the bundle's own, and deleted.

TensorRT and the GPU are fakes (tests/fakes), except in the last test; the compiler makes the fault.
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
from bridge_stg.export.engines import bisect_engines, select_builds
from bridge_stg.export.engines import build as engine_build
from bridge_stg.export.engines.bisect_engines import build_like, engine_maker
from bridge_stg.export.engines.compile import Compiled
from bridge_stg.export.parity.bisect import Side
from bridge_stg.export.parity.block_outputs import block_outputs, expose_outputs
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
    """A fake TensorRT that compiles one graph's variant wrong, on a fake GPU.

    Attributes:
        calls: path, profiles and options of each compilation.
        installed: families that can be imported.
        fails: exception to raise instead of compiling.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, family: str, wrong: str) -> None:
        self.machine = FakeMachine(monkeypatch, folder / "cache", family=family, eager=())
        self.folder, self.wrong = folder / "compiled", wrong
        self.calls: list[dict[str, Any]] = []
        self.installed = {family}
        self.fails: BaseException | None = None
        device = SimpleNamespace(sm=87, memory=8 * 10**9)
        monkeypatch.setattr(select_builds, "machine", lambda: SimpleNamespace(devices=(device,), device_problem=None))
        monkeypatch.setattr(select_builds, "load_tensorrt", self.load)
        monkeypatch.setattr(bisect_engines, "load_tensorrt", self.load)
        monkeypatch.setattr(engine_build, "compile_graph", self.compile)

    def load(self, family: str) -> Any:
        if family not in self.installed:
            raise EngineError("engine.not_installed", family)
        return SimpleNamespace(__version__=VERSION, family=family)

    def compile(self, tensorrt: Any, path: Path, profiles: Mapping[str, Any], **options: Any) -> Compiled:
        self.calls.append({"path": path, "profiles": profiles, "family": tensorrt.family, **options})
        if options["report"] is not None:
            options["report"]("Building", 1, 2)
        if self.fails is not None:
            raise self.fails
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
    """Return the contract of a graph, read from the graph."""
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
    """A copy of the tiny bundle."""
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
    fake = compiler(family, "standard")
    profiles = tmp_path / "profiles.yaml"
    profiles.write_text("capacity: 1024\nlanguage_model: {wide: {B: 4, L: 256, K: [1, 1, 8], V: [2, 64, 2048]}}\n")
    assert run(["build", str(bundle.path), "--target", "this", "--profiles", str(profiles)]) == 0
    own = {entry.graph: entry for entry in read_engines(bundle)}
    before, count = files(tmp_path / "place", tmp_path / "cache"), len(fake.calls)
    fake.installed = set(BACKENDS)  # the bundle's engine decides which of them it is
    capsys.readouterr()
    backend = BACKENDS[family]
    assert run(["verify", str(bundle.path), "--backend", backend, "--variant", "standard", "--bisect"]) == 2
    shown = capsys.readouterr()
    (error,) = [line for line in shown.err.splitlines() if line.startswith("Error: ")]
    assert f"begins in {BLOCK}" in error and "on onnxruntime" in error
    compiled = fake.calls[count:]
    assert len(compiled) == 2  # blocks, and the outputs of one
    for call in compiled:
        assert call["path"].name == "standard.onnx" and bundle.path not in call["path"].parents
        assert call["profiles"] == own[GRAPH].profiles and "wide" in call["profiles"] and call["capacity"] == 1024
        assert call["family"] == family and call["report"] is not None
    assert files(tmp_path / "place", tmp_path / "cache") == before
    assert not fake.machine.cuda.allocations


def test_the_reference_may_be_an_engine_too(
    bundle: Bundle, compiler: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = compiler("tensorrt", "primitive")
    for variant in ("standard", "primitive"):
        assert run(["build", str(bundle.path), "--target", "this", "--variant", variant]) == 0
    before, count = files(tmp_path / "place", tmp_path / "cache"), len(fake.calls)
    capsys.readouterr()
    assert run(["verify", str(bundle.path), "--bisect"]) == 2  # tensorrt is what "auto" takes here
    error = capsys.readouterr().err
    assert f"begins in {BLOCK}" in error and f"{GRAPH} (standard) of {bundle.path} on tensorrt" in error
    assert sorted(call["path"].stem for call in fake.calls[count:]) == ["primitive"] * 2 + ["standard"] * 2
    assert files(tmp_path / "place", tmp_path / "cache") == before


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (EngineError("engine.out_of_memory", "8 GB"), 2, "8 GB [engine.out_of_memory]"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
    ids=["fails", "interrupted"],
)  # fmt: skip
def test_a_failed_build_leaves_nothing(
    bundle: Bundle, compiler: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    *, problem: BaseException, code: int, message: str,
) -> None:  # fmt: skip
    fake = compiler("tensorrt", "standard")
    assert run(["build", str(bundle.path), "--target", "this"]) == 0
    before = files(tmp_path / "place", tmp_path / "cache")
    fake.fails = problem
    capsys.readouterr()
    assert run(["verify", str(bundle.path), "--backend", "tensorrt", "--variant", "standard", "--bisect"]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    if code == 2:
        assert f"{GRAPH}_0.logits" in error
    assert files(tmp_path / "place", tmp_path / "cache") == before


def test_a_backend_that_runs_graphs_needs_none(bundle: Bundle, compiler: Any) -> None:
    fake = compiler("tensorrt", "standard")
    engine_maker()(Side(bundle, GRAPH, "standard", "onnxruntime"), bundle)
    assert not fake.calls


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_a_real_tensorrt_compiles_graphs_with_block_outputs(
    exported_fp16: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Compiles ahead of time for `rtx-ampere`; nothing runs, which needs a GPU."""
    pytest.importorskip("tensorrt_rtx_bindings", reason='no TensorRT-RTX: pip install -e ".[rtx]" to run this')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(exported_fp16.path, tmp_path / "b")
    bundle = Bundle.load(tmp_path / "b")
    overrides = {"capacity": 512, "language_model": {"prefill": None}}
    options: dict[str, Any] = {"graphs": [GRAPH], "variant": variant, "overrides": overrides}
    (own,) = engine_build.build_engines(bundle, ["rtx-ampere"], **options)
    outputs = block_outputs(bundle.graph_path(GRAPH, variant))
    exposed = expose_outputs(bundle, GRAPH, variant, outputs, tmp_path / "exposed")
    made: EngineEntry = build_like(own, exposed)
    assert made.plan.is_relative_to(tmp_path / "exposed") and made.read_plan()
    assert (made.profiles, made.capacity, made.key.sms) == (own.profiles, own.capacity, own.key.sms)
    assert len(made.outputs) == len(own.outputs) + len(outputs) and len(outputs) > 20
    assert read_engines(bundle) == [own]
