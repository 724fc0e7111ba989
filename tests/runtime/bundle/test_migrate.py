"""A bundle of the schema before this one, made by the release that wrote it, gives the answers of that release."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bridge_stg
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import SCHEMA_VERSION, canonical_sha256
from bridge_stg.runtime.bundle.writer import migrate_bundle
from tests.errors import raises

ARCHIVE = Path(__file__).with_name(f"schema_{SCHEMA_VERSION - 1}.tar.xz")
"""A tiny random model with bridge heads, exported by 0.1.0 as `primitive`, which every onnxruntime runs."""
ANSWERED = {"span": (0.0, 2.0), "named_span": (0.0, 1.0), "answer": "<0.2 seconds> to <0.2 seconds>"}
"""By 0.1.0, to the query "the red car" on `frames()`."""
BOXES = [(0.0, 59.32, 48.0, 64.0), (0.0, 59.34, 48.0, 64.0), (0.0, 57.32, 48.0, 64.0), (0.0, 59.34, 48.0, 64.0)]
PRESENCE = [0.919221, 0.902357, 0.931981, 0.884855]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old" / "bundle"


def frames() -> Iterator[tuple[float, Any]]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    return ((i / 2, image) for i, image in enumerate(pixels))


def check_answers(bundle: Path) -> None:
    with Grounder.load(bundle, backend="onnxruntime") as grounder:
        found = grounder.ground(frames(), "the red car", allow_none=False)
    assert {name: getattr(found, name) for name in ANSWERED} == ANSWERED
    assert found.tube is not None
    np.testing.assert_allclose(found.tube.boxes, BOXES, atol=0.05)
    np.testing.assert_allclose(found.tube.presence, PRESENCE, atol=1e-3)


def test_it_runs_as_it_is(old: Path) -> None:
    before = (old / "manifest.json").read_bytes()
    manifest = Bundle.load(old, check="all").manifest
    assert (manifest.schema_version, manifest.made_by) == (SCHEMA_VERSION - 1, "0.1.0")
    check_answers(old)
    assert (old / "manifest.json").read_bytes() == before


def test_it_is_migrated_in_place(old: Path) -> None:
    files = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    assert migrate_bundle(old) and not migrate_bundle(old)
    assert {file for file in old.rglob("*") if file.is_file()} == set(files)
    assert [file.name for file, content in files.items() if file.read_bytes() != content] == ["manifest.json"]
    values = json.loads((old / "manifest.json").read_text())
    assert (values["schema_version"], values["made_by"]) == (SCHEMA_VERSION, "0.1.0")
    check_answers(old)


def test_damaged_and_foreign_bundles_are_not_migrated(old: Path, bundle_path: Path) -> None:
    assert not migrate_bundle(bundle_path)
    assert Bundle.load(bundle_path).manifest.made_by == bridge_stg.__version__
    before = (old / "manifest.json").read_bytes()
    min(old.rglob("*.onnx")).write_bytes(b"")
    with raises("bundle.hash_mismatch"):
        migrate_bundle(old)
    assert (old / "manifest.json").read_bytes() == before
    shutil.rmtree(old / "graphs")
    with raises("bundle.missing_file"):
        migrate_bundle(old)


def test_a_newer_bundle_says_what_made_it(bundle_path: Path) -> None:
    file = bundle_path / "manifest.json"
    values = json.loads(file.read_text()) | {"schema_version": SCHEMA_VERSION + 1, "made_by": "7.8.9", "new_field": 1}
    values["fingerprint"] = canonical_sha256(values, without="fingerprint")
    file.write_text(json.dumps(values))
    with raises("bundle.schema", "7.8.9", bridge_stg.__version__):
        Bundle.load(bundle_path)
