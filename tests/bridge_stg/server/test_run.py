"""The command `serve` as a subprocess: start, service, shutdown, errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bridge_stg import cli
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.packages import install_command
from bridge_stg.server.run import serve
from bridge_stg.server.settings import Settings
from tests.bridge_stg.server.conftest import CLIPS, ROOT, ask, small_clip, upload
from tests.errors import raises
from tests.fakes.chain import fake_grounder

KEY = "a-key-of-the-operator-32-characters"


class Process:
    """A server that was started as people start it."""

    def __init__(self, bundle: Path, folder: Path, *arguments: str) -> None:
        environment = {**os.environ, "TMPDIR": str(folder), "SERVE_KEY": KEY, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "cli.py", "serve", str(bundle), "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+(?=/ )", line)
        assert found, line + (self.process.stderr.read() if self.process.stderr else "")
        self.url = found[0]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=False, **options)

    def end(self, number: int) -> tuple[int, str, float]:
        began = time.monotonic()
        self.process.send_signal(number)
        _, received = self.process.communicate(timeout=60)
        return self.process.returncode, received, time.monotonic() - began


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder for temporary files of the process; nothing is left in it."""
    place = tmp_path / "temporary"
    place.mkdir()
    yield place
    assert not list(place.glob("bridge-stg*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_leaves_nothing(number: int, exported: Any, folder: Path, tmp_path: Path) -> None:
    process = Process(exported.path, folder, "--live", f"gate={CLIPS[0]}", "--drain-s", "3")
    with process.client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        assert list(folder.rglob("*"))
        streaming = threading.Event()

        def follow() -> None:
            with process.client() as own, own.stream("GET", "/v1/live/gate/events?query=a") as stream:
                for _ in stream.iter_lines():
                    streaming.set()

        follower = threading.Thread(target=follow)
        follower.start()
        assert streaming.wait(30)
        for i in range(10):
            assert ask(client, video, [f"thing {i}"]).status_code == 202
        code, received, took = process.end(number)
        follower.join(20)
    assert code == 0 and received == "" and took < 20


def test_a_second_signal_does_not_wait(exported: Any, folder: Path, tmp_path: Path) -> None:
    process = Process(exported.path, folder, "--drain-s", "50")
    with process.client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4", seconds=30))["id"]
        for i in range(60):
            ask(client, video, [f"thing {i} {j}" for j in range(16)], allow_none=False)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        _, received, took = process.end(signal.SIGTERM)
    assert took < 25 and received == ""


def test_with_a_key_from_the_environment_it_may_listen_everywhere(exported: Any, folder: Path) -> None:
    process = Process(exported.path, folder, "--host", "0.0.0.0", "--api-key-env", "SERVE_KEY")
    with process.client() as client:
        assert client.get("/v1/live").status_code == 401
        assert client.get("/v1/live", headers={"Authorization": f"Bearer {KEY}"}).json() == {"live": []}
    code, received, _ = process.end(signal.SIGTERM)
    assert code == 0 and KEY not in received


def test_faults_are_one_paragraph(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("EMPTY_KEY", "")
    bundle = str(exported.path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, word in (
            ([bundle, "--port", port], "--port"),
            ([str(tmp_path / "none"), "--port", "0"], "none"),
            ([str(tmp_path), "--port", "0"], "manifest.json"),
            ([bundle, "--host", "0.0.0.0"], "--insecure"),
            ([bundle, "--host", "no.such.host.invalid", "--insecure"], "no.such.host.invalid"),
            ([bundle, "--host", "192.0.2.1", "--insecure", "--port", "0"], "192.0.2.1"),
            ([bundle, "--api-key", "short"], "API key"),
            ([bundle, "--api-key-env", "EMPTY_KEY"], "EMPTY_KEY"),
            ([bundle, "--api-key", KEY, "--api-key-env", "PATH"], "--api-key-env"),
            ([bundle, "--media", str(tmp_path / "none")], "--media"),
            ([bundle, "--live", "gate"], "gate=rtsp"),
            ([bundle, "--live", "a/b=0"], "a/b"),
            ([bundle, "--live", f"gate={tmp_path}/none.mp4", "--port", "0"], "--live gate"),
            ([bundle, "--live", "a=0", "--live", "a=1"], "--live"),
            ([bundle, "--backend", "none", "--port", "0"], "none"),
            ([bundle, "--max-queue", "0"], "--max-queue"),
            ([bundle, "--port", "0", "--window", "9999"], "--window 9999: "),
            ([bundle, "--port", "0", "--every", "inf"], "--every inf: "),
        ):
            assert cli.run(["serve", *arguments]) == 2, arguments
            received = capsys.readouterr().err
            assert word in received and "Traceback" not in received and KEY not in received, received
            if not received.startswith("Usage"):
                assert received.startswith("Error: ") and received.count("\n") == 1, received
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("bridge-stg-serve")]


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_says_what_to_install(package: str, exported: Any) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None; sys.path.insert(0, {str(ROOT)!r}); from bridge_stg import cli; "
        f"sys.exit(cli.run(['serve', {str(exported.path)!r}, '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and install_command("serve") in done.stderr, done.stderr


def test_a_model_that_does_not_run_is_not_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(grounder: Grounder) -> None:
        raise EngineError("engine.failed", "the encoder does not run")

    monkeypatch.setattr(Grounder, "load", lambda bundle: fake_grounder())
    monkeypatch.setattr(Grounder, "warm_up", fail)
    with raises("engine.failed"):
        serve(tmp_path, Settings(port=0), say=pytest.fail, live={})
