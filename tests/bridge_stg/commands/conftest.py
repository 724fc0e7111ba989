"""A fake grounder for the commands, and a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.visualize.annotate import encode_h264
from tests.bridge_stg.commands.fake_grounder import SIZE, TIMES, FakeGrounder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setattr(FakeGrounder, "calls", [])
    monkeypatch.setattr(Grounder, "load", FakeGrounder.load)
    monkeypatch.setattr("bridge_stg.runtime.loading.load_grounder", FakeGrounder.load)
    return FakeGrounder.calls


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    encode_h264(((float(t), Image.new("RGB", SIZE, (60, 90, 70))) for t in TIMES), tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"
