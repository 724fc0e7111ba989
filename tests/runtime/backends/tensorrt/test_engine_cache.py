"""The engine cache: what fits is found, what does not is told before an engine is opened, and nothing is half there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.runtime.backends.tensorrt.engine_cache import (
    ABOUT,
    PLAN,
    EngineDevice,
    EngineEntry,
    EngineKey,
    engine_folders,
    find_engine,
    graph_digest,
    profile_digest,
    read_engines,
)
from bridge_stg.runtime.backends.tensorrt.engine_store import new_engine, publish, writable_folder
from bridge_stg.runtime.bundle.bundle import Bundle
from tests.errors import raises

DEVICE = EngineDevice("tensorrt", "10.15.1", 87, "linux-aarch64")
PROFILES = {"prefill": {"B": (1, 1, 1), "L": (1, 64, 128)}, "decode": {"B": (1, 1, 8), "L": (1, 1, 4)}}


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Bundle.load(bundle_path)


def put(bundle: Bundle, *, plan: bytes = b"a plan", folder: Path | None = None, **changed: Any) -> EngineEntry:
    graph = bundle.graph("language_model", "standard")
    finished = changed.pop("finished", "2026-01-01T00:00:00+00:00")
    key = EngineKey(
        DEVICE.family, DEVICE.version, (DEVICE.sm,), DEVICE.machine, {}, graph_digest(graph),
        profile_digest(PROFILES, 64),
    )  # fmt: skip
    entry = EngineEntry(
        dataclasses.replace(key, **changed), "this", graph.name, graph.variant, "fp32", PROFILES, 64, graph.inputs,
        graph.outputs, 0, "", {"finished": finished},
    )  # fmt: skip
    with new_engine(folder or writable_folder(bundle)) as partial:
        (partial / PLAN).write_bytes(plan)
        return publish(partial, entry)


def find(bundle: Bundle, device: EngineDevice = DEVICE) -> EngineEntry:
    return find_engine(bundle, bundle.graph("language_model", "standard"), device)


def test_an_engine_that_fits_is_found_as_it_was_written(bundle: Bundle) -> None:
    made = put(bundle)
    found = find(bundle)
    assert found == made and list(found.profiles) == ["prefill", "decode"]
    assert Path(found.folder).is_relative_to(bundle.path / "engines") and found.read_plan() == b"a plan"
    assert Bundle.load(bundle.path, check="all").manifest == bundle.manifest  # engines are outside of the fingerprint


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"version": "10.3.0"}, "was built with TensorRT 10.3.0, and TensorRT 10.15.1 is installed"),
        ({"family": "tensorrt_rtx"}, "was built with TensorRT-RTX 10.15.1, and TensorRT 10.15.1 is installed"),
        ({"sms": (86, 89)}, "was built for SM 86, 89, and this GPU is SM 87"),
        ({"machine": "linux-x86_64"}, "was built for linux-x86_64, and this machine is linux-aarch64"),
        ({"graph": "0" * 64}, "was built from another version of the graph"),
    ],
)  # fmt: skip
def test_a_mismatch_is_told_with_the_command_before_anything_is_opened(
    bundle: Bundle, changed: dict[str, Any], sentence: str
) -> None:
    made = put(bundle, **changed)
    made.plan.unlink()  # so that reading it would fail in other words
    build = f"python cli.py build {bundle.path} --target this --graph language_model --variant standard"
    with raises("engine.not_built", f"{made.folder}: ", sentence, build):
        find(bundle)


def test_the_closest_engine_is_reported(bundle: Bundle) -> None:
    put(bundle, version="9.0", sms=(75,), machine="windows-amd64")
    near = put(bundle, sms=(89,))
    with raises("engine.not_built", near.folder, "SM 89", "SM 87"):
        find(bundle)


def test_no_engine_at_all_names_the_command(bundle: Bundle) -> None:
    with raises("engine.not_built", "language_model (standard)", "TensorRT 10.15.1", "python cli.py build"):
        find(bundle)


def test_of_several_the_last_one_is_taken_and_one_key_is_one_engine(bundle: Bundle) -> None:
    put(bundle, options={"a": "1"}, finished="2026-03-01T00:00:00+00:00")
    put(bundle, finished="2026-02-01T00:00:00+00:00", plan=b"old")
    put(bundle, finished="2026-04-01T00:00:00+00:00", plan=b"new")
    assert len(read_engines(bundle)) == 2
    assert find(bundle).read_plan() == b"new"


def test_the_key_depends_on_everything(bundle: Bundle) -> None:
    key = put(bundle).key
    others = [
        dataclasses.replace(key, **change)
        for change in (
            {"family": "x"}, {"version": "x"}, {"sms": (1,)}, {"machine": "x"}, {"options": {"x": "y"}}, {"graph": "x"},
            {"profiles": "x"},
        )
    ]  # fmt: skip
    assert len({key.digest, *(other.digest for other in others)}) == 8
    turned = dict(reversed(list(PROFILES.items())))
    assert len({profile_digest(PROFILES, 64), profile_digest(PROFILES, 65), profile_digest(turned, 64)}) == 3


def test_weights_are_part_of_the_graph(bundle: Bundle) -> None:
    graph = bundle.graph("language_model", "standard")
    entry = dataclasses.replace(
        next(iter(bundle.manifest.entries().values())), path="graphs/language_model/weights.data", sha256="1" * 64
    )
    other = dataclasses.replace(entry, sha256="2" * 64)
    assert len({graph_digest(dataclasses.replace(graph, data=data)) for data in ((), (entry,), (other,))}) == 3


def test_a_bundle_that_cannot_be_written_keeps_its_engines_in_the_users_cache(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, cache = engine_folders(bundle)
    make = Path.mkdir

    def refuse(self: Path, *rest: Any, **options: Any) -> None:
        if self.is_relative_to(bundle.path):
            raise PermissionError(13, "Permission denied")
        make(self, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    made = put(bundle)
    assert Path(made.folder).is_relative_to(cache) and not inside.exists()
    assert find(bundle) == made

    monkeypatch.setattr(Path, "mkdir", lambda self, *r, **o: refuse(bundle.path))
    with raises("output.not_writable", "Permission denied", "XDG_CACHE_HOME"):
        writable_folder(bundle)


def damage_plan(folder: Path) -> None:
    (folder / PLAN).write_bytes(b"b plan")


def damage_about(folder: Path) -> None:
    values = json.loads((folder / ABOUT).read_text())
    values["capacity"] = 4096
    (folder / ABOUT).write_text(json.dumps(values))


def older_schema(folder: Path) -> None:
    (folder / ABOUT).write_text('{"schema_version": 0}')


def no_json(folder: Path) -> None:
    (folder / ABOUT).write_text("{")


@pytest.mark.parametrize(
    ("damage", "file"), [(damage_plan, PLAN), (damage_about, ABOUT), (older_schema, ABOUT), (no_json, ABOUT)]
)
def test_damage_is_found(bundle: Bundle, damage: Callable[[Path], None], file: str) -> None:
    damage(Path(put(bundle).folder))
    with raises("engine.damaged", file, "uild"):
        find(bundle).read_plan()


def test_a_damaged_engine_of_another_graph_is_ignored(bundle: Bundle) -> None:
    made = put(bundle)
    other = Path(made.folder).with_name("spatial_decoder.standard.000000000000")
    shutil.copytree(made.folder, other)
    no_json(other)
    assert find(bundle) == made


def test_a_damaged_engine_does_not_hide_an_intact_one(bundle: Bundle) -> None:
    damaged, made = put(bundle, options={"tf32": "off"}), put(bundle)
    no_json(Path(damaged.folder))
    assert find(bundle) == made
    shutil.rmtree(made.folder)
    with raises("engine.damaged", ABOUT, f"python cli.py build {bundle.path} --target"):
        find(bundle)


def test_an_interrupted_build_leaves_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = put(bundle)
    with pytest.raises(KeyboardInterrupt), new_engine(writable_folder(bundle)) as partial:
        (partial / PLAN).write_bytes(b"half")
        raise KeyboardInterrupt
    real = os.rename

    def fail_once(source: Any, target: Any) -> None:
        if Path(source).parent.name == "new":
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="disk full"):
        put(bundle, plan=b"a newer plan")
    assert find(bundle) == before and before.read_plan() == b"a plan"
    assert [path.name for path in (bundle.path / "engines").iterdir()] == [before.key.target]


def test_what_a_killed_build_left_goes_with_the_next(bundle: Bundle) -> None:
    folder = writable_folder(bundle)
    left = folder / ".engine.0123abcd.partial"
    (left / "new" / "engine").mkdir(parents=True)
    with new_engine(folder) as alive:
        put(bundle)
        assert not left.exists() and alive.exists()
