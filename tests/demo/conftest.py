"""The demo checkpoint, exported once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge_stg.checkpoint import load_checkpoint
from bridge_stg.export.onnx_export import export_bundle
from bridge_stg.model import BridgeSTG
from bridge_stg.runtime import Grounder

DEMO = Path(__file__).parents[2] / "assets" / "demo"


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(DEMO / "checkpoint", tmp_path_factory.mktemp("demo") / "bundle")


@pytest.fixture(scope="session")
def demo_model() -> BridgeSTG:
    return load_checkpoint(DEMO / "checkpoint")


@pytest.fixture(scope="session", params=["standard", "primitive"])
def demo_grounder(request: pytest.FixtureRequest, demo_bundle: Path) -> Iterator[Grounder]:
    with Grounder.load(demo_bundle, variant=request.param) as grounder:
        yield grounder
