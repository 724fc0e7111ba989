"""The demo checkpoint in torch, and its bundle of tests/conftest.py loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge_stg.runtime import Grounder

if TYPE_CHECKING:
    from bridge_stg.model.model import BridgeSTG

DEMO = Path(__file__).parents[3] / "assets" / "demo"


@pytest.fixture(scope="session")
def demo_model() -> BridgeSTG:
    from bridge_stg.checkpoint.checkpoint import load_checkpoint

    return load_checkpoint(DEMO / "checkpoint")


@pytest.fixture(scope="session", params=["standard", "primitive"])
def demo_grounder(request: pytest.FixtureRequest, demo_bundle: Path) -> Iterator[Grounder]:
    with Grounder.load(demo_bundle, variant=request.param) as grounder:
        yield grounder
