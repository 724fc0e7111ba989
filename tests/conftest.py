"""The tiny model of tests/export as a checkpoint and as bundles, made once per test session."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bridge_stg.model.model import BridgeSTG
    from bridge_stg.runtime.bundle.bundle import Bundle

ROOT = str(Path(__file__).resolve().parents[1])

# torch is imported by the fixtures alone: most tests of the runtime do without, and some run where it is not installed.


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tokenizer.json."""
    from bridge_stg.demo.tiny_model import write_demo_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_demo_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tokenizer_path: Path) -> BridgeSTG:
    """A small random model whose outputs depend on its inputs."""
    from tests.bridge_stg.model.tiny_model import make_tiny_model

    return make_tiny_model(tokenizer_path)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny model, in float16 as the demo's is."""
    from bridge_stg.checkpoint.checkpoint import save_checkpoint
    from bridge_stg.demo.tiny_model import write_demo_tokenizer
    from tests.export.conftest import random_model

    folder = tmp_path_factory.mktemp("checkpoint")
    write_demo_tokenizer(folder / "demo.json")
    save_checkpoint(random_model(), folder / "tiny", folder / "demo.json")
    return folder / "tiny"


@pytest.fixture(scope="session")
def stages() -> list[str]:
    """The stages that the session's export reported, filled in by `exported`."""
    return []


@pytest.fixture(scope="session")
def exported(checkpoint: Path, stages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint, exported in both variants; every hash of the bundle has been checked."""
    from bridge_stg.runtime.bundle.bundle import Bundle

    return Bundle.load(export_once(tmp_path_factory, "exported", checkpoint, stages), check="all")


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, exported in both variants."""
    return export_once(tmp_path_factory, "demo", Path(ROOT) / "assets" / "demo" / "checkpoint")


@pytest.fixture(scope="session")
def exported_fp16(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same in fp16."""
    from bridge_stg.runtime.bundle.bundle import Bundle

    return Bundle.load(export_once(tmp_path_factory, "fp16", checkpoint, dtype="fp16"))


def export_once(
    factory: pytest.TempPathFactory,
    name: str,
    checkpoint: Path,
    stages: list[str] | None = None,
    *,
    dtype: str = "fp32",
) -> Path:
    """Return a process's own copy of a bundle that the first of the test processes exports, under a lock.

    Args:
        factory: pytest's factory of temporary folders.
        name: name of the export in the test session.
        checkpoint: the checkpoint, equal in all processes.
        stages: list to which the stages of the export are added.
        dtype: precision of the export.
    """
    import fcntl

    from bridge_stg.export.export_bundle import export_bundle

    own = factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)
    bundle, reported = shared / name, shared / f"{name}.json"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not reported.exists():
            said: list[str] = []
            export_bundle(checkpoint, bundle, dtype=dtype, progress=said.append)
            reported.write_text(json.dumps(said), encoding="utf-8")
    if stages is not None:
        stages += json.loads(reported.read_text(encoding="utf-8"))
    return Path(shutil.copytree(bundle, factory.mktemp(name) / "bundle"))
