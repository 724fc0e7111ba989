"""The tiny model of tests/export as a checkpoint and as bundles, made once per test session."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bridge_stg.model.model import BridgeSTG
    from bridge_stg.runtime.bundle.bundle import Bundle

ROOT = str(Path(__file__).resolve().parents[1])

# torch is imported by the fixtures alone: most tests of the runtime do without, and some run where it is not installed.


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "reuse the checkpoints and bundles in this folder and add missing ones, so that two Pythons can share them"
    parser.addoption("--bundles", metavar="DIR", type=Path, help=text)


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of checkpoints and bundles that all test processes share."""
    own = tmp_path_factory.getbasetemp()
    given: Path | None = pytestconfig.getoption("bundles")
    folder = given or (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


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
def checkpoint(shared: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny model, in float16 as the demo's is."""

    def save(folder: Path) -> None:
        from bridge_stg.checkpoint.checkpoint import save_checkpoint
        from tests.export.conftest import random_model

        save_checkpoint(random_model(), folder, tokenizer_path)

    return copy_of(tmp_path_factory, shared, "tiny", save)


@pytest.fixture(scope="session")
def stages() -> list[str]:
    """The stages that the session's export reported, filled in by `exported`."""
    return []


@pytest.fixture(scope="session")
def exported(checkpoint: Path, stages: list[str], shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint, exported in both variants; every hash of the bundle has been checked."""
    from bridge_stg.runtime.bundle.bundle import Bundle

    return Bundle.load(export_once(tmp_path_factory, shared, "exported", checkpoint, stages), check="all")


@pytest.fixture(scope="session")
def plain_folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a random model of a family as it is downloaded: two shards, and a tied head in Qwen3-VL."""

    def save(folder: Path) -> None:
        from tests.bridge_stg.checkpoint.plain_folders import make_plain_folder

        make_plain_folder(folder, folder.name.removeprefix("plain_"), layers=3, shards=2)

    return lru_cache(lambda family: copy_of(tmp_path_factory, shared, f"plain_{family}", save))


@pytest.fixture(scope="session")
def text_bundle(
    plain_folder: Callable[[str], Path], shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """Return that folder of a family, exported in both variants."""
    from bridge_stg.runtime.bundle.bundle import Bundle

    def load(family: str) -> Bundle:
        return Bundle.load(export_once(tmp_path_factory, shared, f"text_{family}", plain_folder(family)))

    return lru_cache(load)


@pytest.fixture(scope="session")
def demo_bundle(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, exported in both variants."""
    return export_once(tmp_path_factory, shared, "demo", Path(ROOT) / "assets" / "demo" / "checkpoint")


@pytest.fixture(scope="session")
def exported_fp16(checkpoint: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same in fp16."""
    from bridge_stg.runtime.bundle.bundle import Bundle

    return Bundle.load(export_once(tmp_path_factory, shared, "fp16", checkpoint, dtype="fp16"))


def export_once(
    factory: pytest.TempPathFactory,
    shared: Path,
    name: str,
    checkpoint: Path,
    stages: list[str] | None = None,
    *,
    dtype: str = "fp32",
) -> Path:
    """Return a process's own copy of a bundle that the first of the test processes exports.

    Args:
        factory: pytest's factory of temporary folders.
        shared: folder that the test processes share.
        name: name of the export in the test session.
        checkpoint: the checkpoint, equal in all processes.
        stages: list to which the stages of the export are added.
        dtype: precision of the export.
    """
    reported = shared / f"{name}.json"

    def export(folder: Path) -> None:
        from bridge_stg.export.export_bundle import export_bundle

        said: list[str] = []
        export_bundle(checkpoint, folder, dtype=dtype, progress=said.append)
        reported.write_text(json.dumps(said), encoding="utf-8")

    bundle = copy_of(factory, shared, name, export)
    if stages is not None:
        stages += json.loads(reported.read_text(encoding="utf-8"))
    return bundle.rename(bundle.with_name("bundle"))


def copy_of(factory: pytest.TempPathFactory, shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Return a process's own copy of the folder shared/`name`, which the first test process makes, under a lock."""
    import fcntl

    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / f"{name}.made").exists():
            make(shared / name)
            (shared / f"{name}.made").touch()
    return Path(shutil.copytree(shared / name, factory.mktemp(name) / name))
