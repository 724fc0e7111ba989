"""`build`: its errors, its files, and that the runtime finds the engines of a real TensorRT."""

from __future__ import annotations

import importlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.recipes import RECIPES
from bridge_stg.export.engines import build as engine_build
from bridge_stg.export.engines import select_builds
from bridge_stg.export.engines.build import build_engines, engine_line
from bridge_stg.export.engines.compile import Compiled
from bridge_stg.export.engines.layers import plan_summary
from bridge_stg.export.engines.select_builds import load_tensorrt
from bridge_stg.export.engines.targets import ahead_of_time
from bridge_stg.runtime.backends.tensorrt.engine_cache import ABOUT, PLAN, EngineDevice, find_engine, read_engines
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import BridgeError, EngineError
from bridge_stg.runtime.host.packages import install_command
from tests.calibration.golden_ranges import golden_ranges
from tests.errors import raises
from tests.export.engines import real_tensorrt

CLI = Path(__file__).resolve().parents[3] / "cli.py"
FEW = {
    "vision_encoder": dict.fromkeys(("coarse_portrait", "fine_landscape", "fine_portrait")),
    "spatial_decoder": dict.fromkeys(("frames_16_portrait", "frames_64_landscape", "frames_64_portrait")),
}
"""Overrides that leave one profile of four."""


@pytest.fixture
def bundle(exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A copy of the tiny bundle."""
    return _copy(exported, tmp_path, monkeypatch)


def _copy(bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    shutil.copytree(bundle.path, folder / "b", ignore=shutil.ignore_patterns("engines"))
    return Bundle.load(folder / "b")


@pytest.fixture
def rtx() -> Any:
    return real_tensorrt.rtx()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of a fake TensorRT-RTX that compiles nothing: its engines are the word `plan`."""
    calls: list[dict[str, Any]] = []

    def compile_graph(tensorrt: Any, path: Any, profiles: Any, **options: Any) -> Compiled:
        calls.append({"path": path, "profiles": profiles, **options})
        if options["report"] is not None:
            options["report"]("Building", 1, 2)
        return Compiled(b"plan", None)

    module = SimpleNamespace(__version__="1.7.1")
    monkeypatch.setattr(select_builds, "load_tensorrt", lambda family: module)
    monkeypatch.setattr(engine_build, "compile_graph", compile_graph)
    return calls


@pytest.fixture(scope="session")
def quantized(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle in w8a8."""
    folder = tmp_path_factory.mktemp("quantized")
    ranges = golden_ranges(exported, folder / "ranges")
    recipe = RECIPES["w8a8"].with_graph("spatial_decoder", "w8a8")
    return Bundle.load(quantize_bundle(exported, folder / "b", recipe=recipe, ranges=ranges))


@pytest.mark.slow
def test_a_real_tensorrt_builds_what_the_runtime_finds(
    rtx: Any, exported_fp16: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _copy(exported_fp16, tmp_path, monkeypatch)
    entries = build_engines(bundle, ["rtx-ampere"], precision="fp16", overrides=FEW)
    assert [entry.graph for entry in entries] == list(bundle.manifest.graphs)
    for entry in entries:
        device = EngineDevice("tensorrt_rtx", rtx.__version__, 86)
        assert find_engine(bundle, bundle.graph(entry.graph, "standard"), device) == entry
        assert entry.read_plan() and entry.built["seconds"] > 0 and entry.built["peak_memory_bytes"] > 10**8
        matmuls = plan_summary(entry.built["layers"])["products"]
        assert set(matmuls) <= ({"fp16", "fp32"} if entry.graph == "spatial_decoder" else {"fp16"})
    language = next(entry for entry in entries if entry.graph == "language_model")
    assert list(language.profiles) == ["prefill", "decode"] and language.capacity is not None
    assert plan_summary(language.built["layers"])["attention"] == {"fused": 3}
    said: list[str] = []
    assert build_engines(bundle, ["rtx-ampere"], overrides=FEW, say=said.append) == entries
    assert len(said) == 3 and all("exists already" in line for line in said)


def test_what_is_there_is_not_compiled_again(bundle: Bundle, fake: list[dict[str, Any]]) -> None:
    said: list[str] = []
    made = build_engines(bundle, ["rtx-ada", "rtx-ada"], graphs=["language_model"], say=said.append)
    assert len(fake) == 1 and fake[0]["sms"] == (89,)
    assert fake[0]["capacity"] == made[0].capacity
    assert any("no program as text" in line for line in said)  # the fake one
    assert build_engines(bundle, ["rtx-ada"], graphs=["language_model"], say=said.append) == made
    assert len(fake) == 1 and said[-1].endswith(f": {made[0].folder}")
    build_engines(bundle, ["rtx-ada"], graphs=["language_model"], overrides={"capacity": 512})
    build_engines(bundle, ["rtx-ada"], graphs=["language_model"], overwrite=True)
    assert len(fake) == 3 and len(read_engines(bundle)) == 2
    assert engine_line(made[0]).startswith("language_model (standard, fp32) for rtx-ada: 0 MB, ")


@pytest.mark.parametrize(("file", "damage"), [(PLAN, b"pla"), (PLAN, b"plam"), (ABOUT, b"{"), (ABOUT, None)])
def test_what_is_damaged_is_compiled_again(
    bundle: Bundle, fake: list[dict[str, Any]], file: str, damage: bytes | None
) -> None:
    said: list[str] = []
    (made,) = build_engines(bundle, ["rtx-ada"], graphs=["language_model"])
    damaged = Path(made.folder, file)
    damaged.unlink() if damage is None else damaged.write_bytes(damage)
    (again,) = build_engines(bundle, ["rtx-ada"], graphs=["language_model"], say=said.append)
    assert len(fake) == 2 and again.folder == made.folder and again.read_plan() == b"plan"
    assert damage is None or f"{damaged}: " in said[0]


def test_a_build_that_is_stopped_leaves_nothing(bundle: Bundle, fake: list[dict[str, Any]]) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, ["rtx-ada"], report=stop)
    assert len(fake) == 1
    assert not [path for path in (bundle.path / "engines").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_tensorrt_is_stopped_between_its_steps(rtx: Any, bundle: Bundle) -> None:
    seen: list[tuple[str, int, int]] = []

    def stop(phase: str, step: int, steps: int) -> None:
        seen.append((phase, step, steps))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, ["rtx-ada"], graphs=["spatial_decoder"], overrides=FEW, report=stop)
    assert len(seen) == 3 and all(steps > 0 for _, _, steps in seen)
    assert not [path for path in (bundle.path / "engines").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_ctrl_c_stops_tensorrt(rtx: Any, bundle: Bundle) -> None:
    command = [sys.executable, CLI, "build", bundle.path, "--target", "rtx-ada", "--graph", "spatial_decoder"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None and "compiling" in started.stderr.readline()
        time.sleep(1)  # by now TensorRT works, and calls back
        started.send_signal(signal.SIGINT)
        said = started.stderr.read()
    assert started.returncode == 130 and said.strip().endswith("[call.cancelled]") and "\n" not in said.strip()
    assert not [path for path in (bundle.path / "engines").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("targets", "options", "code", "values"),
    [
        (["orin"], {}, "options.invalid", ("'orin'", "this")),
        (["orin-jp6"], {"precision": "fp8"}, "engine.unsupported_precision", ("fp8", "fp32, fp16, bf16, int8, int4")),
        (["rtx-ada"], {"precision": "fp16"}, "engine.wrong_precision", ("--precision fp16", "fp32", "--dtype fp16")),
        (["rtx-ada"], {"precision": "int8"}, "engine.wrong_precision", ("calibrate",)),
        (["rtx-ada"], {"variant": "ort-cpu"}, "engine.unsupported_variant", ("standard or primitive", "ort-cpu")),
        (["orin-jp7"], {}, "engine.no_device", ("orin-jp7", "SM 87")),
        (["rtx-ada"], {"overrides": {"capacity": 10**7}}, "engine.bad_profile", ("10000000",)),
    ],
)  # fmt: skip
def test_misuse_is_reported_before_anything_is_compiled(
    bundle: Bundle, fake: list[dict[str, Any]], *, targets: list[str], options: dict[str, Any], code: str,
    values: tuple[str, ...],
) -> None:  # fmt: skip
    with raises(code, *values, kind=EngineError):
        build_engines(bundle, ["rtx-ampere", *targets], **options)
    assert not fake and not (bundle.path / "engines").exists()


@pytest.mark.parametrize(("options", "name"), [({"graphs": ["decoder"]}, "decoder"), ({"variant": "other"}, "other")])
def test_graphs_that_the_bundle_lacks(bundle: Bundle, fake: Any, options: dict[str, Any], name: str) -> None:
    with pytest.raises(BridgeError) as caught:
        build_engines(bundle, ["rtx-ada"], **options)
    assert repr(name) in str(caught.value) and not fake


def test_this_machine_without_a_gpu(bundle: Bundle, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = SimpleNamespace(devices=(), device_problem="no driver")
    monkeypatch.setattr(select_builds, "machine", lambda: bare)
    with raises("engine.no_device", "no driver", ", ".join(ahead_of_time()), kind=EngineError):
        build_engines(bundle, ["this"])
    monkeypatch.undo()  # of the fake too: TensorRT is imported on the device only
    monkeypatch.setattr(select_builds, "machine", lambda: bare)
    with raises("engine.no_device", "orin-jp6", "SM 87", "no GPU", kind=EngineError):
        build_engines(bundle, ["orin-jp6"])


@pytest.mark.parametrize(
    ("version", "variant"), [("10.3.0", "primitive"), ("10.15.1", "standard"), ("11.4.1", "standard")]
)
def test_this_machine_gets_the_variant_that_its_tensorrt_takes(
    bundle: Bundle, fake: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, version: str, variant: str
) -> None:
    device = SimpleNamespace(sm=87, memory=8 * 10**9)
    monkeypatch.setattr(select_builds, "machine", lambda: SimpleNamespace(devices=(device,), device_problem=None))
    monkeypatch.setattr(select_builds, "load_tensorrt", lambda family: SimpleNamespace(__version__=version))
    entries = build_engines(bundle, ["this"])
    assert {entry.variant for entry in entries} == {variant}
    assert {entry.key.family for entry in entries} == {"tensorrt"} and entries[0].key.sms == (87,)
    assert all(call["sms"] == () for call in fake)
    wrong = "orin-jp7" if variant == "primitive" else "orin-jp6"
    with raises("engine.wrong_version", wrong, version, kind=EngineError):
        build_engines(bundle, [wrong])
    if variant == "primitive":
        with raises("engine.unsupported_variant", "primitive", "standard", kind=EngineError):
            build_engines(bundle, ["this"], variant="standard")
    else:
        with raises("engine.no_device", "h100", "SM 90", "SM 87", kind=EngineError):
            build_engines(bundle, ["h100"], variant="standard")


def test_memory_is_checked_first(bundle: Bundle, fake: list[dict[str, Any]], monkeypatch: Any) -> None:
    monkeypatch.setattr(select_builds, "available_bytes", lambda: 10**8)
    with raises("engine.out_of_memory", "0.5 GB", "0.1 GB", kind=EngineError):
        build_engines(bundle, ["rtx-ada"])
    assert not fake
    assert len(build_engines(bundle, ["rtx-ada"], check_memory=False)) == 3
    monkeypatch.setattr(select_builds, "available_bytes", lambda: None)
    with raises("engine.out_of_memory", "rtx-ada", "8.0 GB", "9.0 GB", kind=EngineError):
        build_engines(bundle, ["rtx-ada"], activations=lambda build: 9 * 10**9)


def test_what_the_support_table_rejects_is_not_built(
    quantized: Bundle, fake: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(target: str, recipe: str, variant: str, dtype: str) -> str:
        assert (target, recipe, variant, dtype) == ("tensorrt-rtx", "w8a8", "standard", "fp32")
        raise EngineError("engine.unsupported_recipe", "w8a8")

    monkeypatch.setattr(select_builds, "require", reject)
    with raises("engine.unsupported_recipe", kind=EngineError):
        build_engines(quantized, ["rtx-ada"])


def test_a_missing_tensorrt_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, *rest: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with raises("engine.not_installed", "TensorRT-RTX", install_command("rtx", "calibrate"), kind=EngineError):
        load_tensorrt("tensorrt_rtx")
    with raises("engine.not_installed", install_command("tensorrt", "calibrate"), "JetPack", kind=EngineError):
        load_tensorrt("tensorrt")


def test_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, CLI, "build", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    table = run("--targets")
    assert table.returncode == 0 and "orin-jp6" in table.stdout
    for arguments, code in (
        ((str(bundle.path), "--target", "xavier"), "options.invalid"),
        ((str(bundle.path), "--target", "orin-jp6", "--precision", "fp8"), "engine.unsupported_precision"),
        ((str(tmp_path / "none"), "--target", "rtx-ada"), "bundle.not_found"),
        ((str(bundle.path), "--target", "rtx-ada", "--profiles", str(tmp_path / "p.yaml")), "engine.bad_profile"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and f"[{code}]" in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (bundle.path / "engines").exists()
