"""The server's check and its single frames have the times of groundings."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge_stg.runtime.video.open import open_source
from bridge_stg.server.settings import Settings
from bridge_stg.server.videos.probe import probe
from bridge_stg.server.videos.stills import still
from tests.fakes.clips import SPEC
from tests.runtime.video.test_times import FILES


@pytest.mark.parametrize("kind", ["AVI", "AVI, open GOP", "AVI without B-frames", "copied to MKV", "edit list"])
def test_times_are_those_of_groundings(kind: str, tmp_path: Path) -> None:
    path = FILES[kind][0](tmp_path)
    info = probe(str(path), "it", Settings().media_limits)
    with open_source(path, SPEC) as source:
        assert info.duration_s == pytest.approx(source.duration_s, abs=2e-3)
        for time in source.frame_times[[1, 30, 50]]:
            assert still(str(path), info, time + 2e-3)[1] == pytest.approx(time)
