"""Chats with random models as they are downloaded: the server answers what `Grounder.ask` answers."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from tests.bridge_stg.checkpoint.plain_folders import FAMILIES
from tests.bridge_stg.server.conftest import CLIPS, Running, ask, ended, metric, upload
from tests.bridge_stg.server.routes.test_chat import chat, image_part, message, openai_client, text_part, video_part

pytestmark = pytest.mark.slow
QUESTION, OTHER = "What happens in this video?", "Who is it?"
TOKENS = 24


@pytest.fixture(params=FAMILIES)
def running(request: pytest.FixtureRequest, text_bundle: Callable[[str], Bundle]) -> Iterator[Running]:
    with ExitStack() as stack:
        grounder = stack.enter_context(Grounder.load(text_bundle(request.param).path, threads=1))
        server = Running(grounder)
        stack.callback(server.stop)
        yield server


def written(grounder: Grounder, source: Path, question: str) -> str:
    return "".join(grounder.ask(source, question, max_tokens=TOKENS))


def test_answers_are_those_of_the_runtime(running: Running) -> None:
    with running.client() as files, openai_client(running) as client:
        video = upload(files, CLIPS[0])["id"]
        part = video_part(f"upload:{video}")
        whole = chat(client, part, text_part(QUESTION), max_tokens=TOKENS)
        stream = chat(
            client, part, text_part(OTHER), max_tokens=TOKENS, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = stream
        job = ended(files, ask(files, video, ["the red car"]).json()["id"])
    assert whole.choices[0].message.content == written(running.grounder, CLIPS[0], QUESTION) != ""
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == written(running.grounder, CLIPS[0], OTHER) and len([p for p in pieces if p]) > 3
    assert metric(running, "videos_opened_total") == 1 and metric(running, "videos_reused_total") == 2
    with running.grounder.open(CLIPS[0]) as opened:
        result = opened.ground("the red car")
    visual = result.tokens["coarse"]
    for usage in (whole.usage, last.usage):
        assert visual < usage.prompt_tokens < visual + 400 and 0 < usage.completion_tokens <= TOKENS
    found = job["results"][0]
    assert (found["heads"], found["mode"], found["answer"]) == ("text", "joint", result.answer)
    assert found["decoding"] == dict(result.decoding)


def test_a_chat_shares_the_computed_prefix(running: Running) -> None:
    system, before = ("system", "Be brief."), [("user", QUESTION), ("assistant", "A car stops.")]
    with running.client() as files, openai_client(running) as client:
        part = video_part(f"upload:{upload(files, CLIPS[0])['id']}")
        messages: list[dict[str, Any]] = [message(*system), message("user", [part, text_part(QUESTION)])]
        first = chat(client, messages=messages, max_tokens=TOKENS)
        messages += [message("assistant", "A car stops."), message("user", OTHER)]
        second = chat(client, messages=messages, max_tokens=TOKENS)
    grounder = running.grounder
    with grounder.open(CLIPS[0], context=[system]) as opened:
        assert first.choices[0].message.content == "".join(opened.ask(QUESTION, max_tokens=TOKENS))
        assert second.choices[0].message.content == "".join(opened.ask(OTHER, history=before, max_tokens=TOKENS))
    assert metric(running, "videos_opened_total") == 1 and metric(running, "videos_reused_total") == 1
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_an_image(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(path)
    part = image_part(f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}")
    with openai_client(running) as client:
        answer: Any = chat(client, part, text_part(OTHER), max_tokens=TOKENS)
    assert answer.choices[0].message.content == written(running.grounder, path, OTHER)


def test_the_command_asks_and_streams(running: Running, text_bundle: Callable[[str], Bundle]) -> None:
    from click.testing import CliRunner

    from bridge_stg.cli import app

    spec = running.grounder.spec
    bundle = text_bundle(spec.vision.family).path
    words = ["ask", str(CLIPS[0]), QUESTION, "--bundle", str(bundle), "--max-tokens", str(TOKENS), "--threads", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and done.stdout == written(running.grounder, CLIPS[0], QUESTION) + "\n"
