"""What docs/server.md says: its commands run, its routes, codes, options and metrics are those of the server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge_stg.commands.serve import serve
from bridge_stg.server.http.errors import FRAMEWORK_CODES
from bridge_stg.server.settings import Settings
from tests.bridge_stg.server.conftest import ROOT, Running, small_clip

TEXT = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
SOURCES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bridge_stg" / "server").rglob("*.py"))


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("bash") is None, reason="needs curl and bash")
def test_the_curl_lines_run(served: Callable[..., Running], tmp_path: Path) -> None:
    running = served()
    small_clip(tmp_path / "clip.mp4")
    blocks = [block for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) if "curl" in block]
    assert len(blocks) == 2
    received = []
    for block in blocks:
        script = block.replace("http://127.0.0.1:8000", running.url)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        received.append(done.stdout)
    assert [result["query"] for result in json.loads(received[0])["results"]] == ["the red car", "the dog"]
    assert "event: done\n" in received[1] and '"status": "done"' in received[1]
    assert (tmp_path / "annotated.mp4").stat().st_size > 1000
    assert not list(running.service.store.folder.iterdir())


def test_every_route_is_named(served: Callable[..., Running]) -> None:
    with served().client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    rows = (
        "".join(line for line in TEXT.splitlines() if line.startswith("| `"))
        .replace("{id}", "{}")
        .replace("{name}", "{}")
    )
    rows = rows.replace("`…/frame", "`/v1/videos/{}/frame")
    for path in paths:
        plain = re.sub(r"\{\w+\}", "{}", path)
        assert f"`{plain}" in rows or f" {plain}`" in rows or f" {plain}?" in rows, path


def test_the_codes_are_those_that_are_sent() -> None:
    sent = set(re.findall(r'ApiError\(\s*\d+,\s*"([\w.]+)"', SOURCES)) | set(FRAMEWORK_CODES.values())
    table = TEXT[TEXT.index("| status | codes |") : TEXT.index("## How it works")]
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)`", table))
    assert named == sent, named ^ sent


def test_the_limits_are_those_of_the_command() -> None:
    options = {option.opts[0]: option for option in serve.params if option.opts[0].startswith("--")}
    table = TEXT[TEXT.index("| option | default | |") : TEXT.index("MP4, MOV")]
    rows = re.findall(r"^\| `(--[\w-]+)` \| ([\d.]+) \|", table, re.MULTILINE)
    assert len(rows) >= 8
    for name, default in rows:
        assert float(default) == options[name].default, name
    settings = Settings()
    for name, value in (("max_upload_bytes", 256 * 10**6), ("max_storage_bytes", 4096 * 10**6), ("max_videos", 512)):
        assert getattr(settings, name) == value
    for option in options.values():  # the command's defaults are those of `Settings`
        if option.name in Settings.__dataclass_fields__ and option.show_default:
            assert option.default == getattr(settings, option.name), option.name


def test_the_metrics_are_those_that_are_there(served: Callable[..., Running]) -> None:
    registry = served().service.metrics.registry
    there = {
        family.name.removeprefix("bridge_stg_") + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for family in registry.collect()
    }
    section = TEXT[TEXT.index("All names start with") : TEXT.index("## What is protected")]
    assert set(re.findall(r"`([a-z_]+)`", section)) - {"bridge_stg_"} == there
