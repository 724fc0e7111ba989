"""Nothing calls anywhere or leaves files in the home folder: processes run with an empty HOME and a proxy that listens.

The proxy hears every HTTP client, in C too, without rights and without a network. onnxruntime calls after ten seconds.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIP = str(ROOT / "assets" / "demo" / "clips" / "2-moving.mp4")
WATCHED_S = 13.0
API = """
import sys, time
from bridge_stg.runtime import Grounder
with Grounder.load(sys.argv[1], threads=1) as grounder:
    grounder.ground(sys.argv[2], "the white dog")
    time.sleep(float(sys.argv[3]))
"""
JUDGE = """
import sys, time
from bridge_stg.calibration.scoring.saturation_test import multiply_in_onnxruntime
import numpy as np
multiply_in_onnxruntime(np.ones((4, 8), np.int8), np.ones((4, 8), np.int8))
time.sleep(float(sys.argv[3]))
"""
CHILD = """
from bridge_stg.runtime.host.subprocess import run_in_subprocess
run_in_subprocess("builtins:exec", "import onnxruntime; onnxruntime.SessionOptions()", purpose="imports it")
"""
CONTROL = "import onnxruntime, sys, time; onnxruntime.SessionOptions(); time.sleep(float(sys.argv[3]))"


class Watched:
    """A home folder of its own, and a proxy that records whether something connected."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir()
        self._proxy = socket.create_server(("127.0.0.1", 0))
        self._proxy.settimeout(0)

    def start(self, *command: str) -> subprocess.Popen[str]:
        address = f"http://127.0.0.1:{self._proxy.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"), address)
        environment |= {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / "cache"), "no_proxy": ""}
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def found(self) -> list[str]:
        """What the processes left or asked for so far."""
        files = [str(path.relative_to(self.home)) for path in self.home.rglob("*") if path.is_file()]
        try:
            connection, _ = self._proxy.accept()
        except BlockingIOError:
            return files
        with closing(connection):
            connection.settimeout(5)
            return [*files, connection.recv(200).decode(errors="replace")]

    def close(self) -> None:
        self._proxy.close()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with closing(Watched(tmp_path / "home")) as place:
        yield place


def ended(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.mark.parametrize("program", [API, JUDGE, CHILD], ids=["api", "calibration", "child"])
def test_no_file_is_left_in_the_home_folder(program: str, demo_bundle: Path, watched: Watched) -> None:
    ended(watched.start("-c", program, str(demo_bundle), CLIP, "0"))
    assert watched.found == []


@pytest.mark.slow
def test_no_process_calls_anywhere(demo_bundle: Path, watched: Watched, tmp_path: Path) -> None:
    bundle = str(demo_bundle)
    with closing(Watched(tmp_path / "control")) as control:
        alone = control.start("-c", CONTROL, "", "", str(WATCHED_S))
        running = [watched.start("-c", program, bundle, CLIP, str(WATCHED_S)) for program in (API, JUDGE)]
        watch = ("watch", CLIP, "the white dog", "--bundle", bundle, "--realtime")
        running += [watched.start("cli.py", *command) for command in (("infer", *watch[1:5]), watch)]
        server = watched.start("cli.py", "serve", bundle, "--port", "0")
        for process in (alone, *running):
            ended(process)
        time.sleep(1)
        server.terminate()
        ended(server)
        if not control.found:
            pytest.skip("this build of onnxruntime has no telemetry")
    assert watched.found == []
