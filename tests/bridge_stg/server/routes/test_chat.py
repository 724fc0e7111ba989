"""Chats through OpenAI's client: whole and streamed answers, what a request may hold, errors, limits."""

from __future__ import annotations

import base64
import dataclasses
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from bridge_stg.runtime import Grounder, OpenedVideo
from bridge_stg.runtime.bundle.spec import TextSpec
from bridge_stg.runtime.errors import EngineError, Interrupted, QueryError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.server.http import security
from tests.bridge_stg.server.conftest import Running, ask, ended, metric, small_clip, until, upload
from tests.fakes.chain import fake_grounder, fake_spec

PIECES = ["A re", "d ", "car – ", "🚗", " drives."]
KEY = "a-key-of-the-operator-32-characters"


class Script:
    """What `OpenedVideo.ask_within` answers instead of a model.

    Attributes:
        pieces: the pieces of the answer.
        error: what is raised after them.
        gate: what each piece but the first waits for.
        asked: question and `max_tokens` of each call.
        histories: messages before the question of each call.
        stopped: set when a call was stopped.
    """

    def __init__(self) -> None:
        self.pieces, self.error, self.gate = list(PIECES), None, threading.Event()
        self.asked: list[tuple[str, int]] = []
        self.histories: list[Any] = []
        self.stopped = threading.Event()
        self.gate.set()


class ScriptedAnswer:
    """The iterator that `OpenedVideo.ask_within` returns."""

    def __init__(self, script: Script, limits: Limits, question: str, max_tokens: int) -> None:
        self._pieces = self._answer(script, limits, max_tokens)
        self.prompt_tokens, self.tokens, self.finish_reason = 20 + len(question), 0, "stop"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _answer(self, script: Script, limits: Limits, max_tokens: int) -> Iterator[str]:
        for piece in script.pieces:
            if self.tokens == max_tokens:
                self.finish_reason = "length"
                return
            while self.tokens and not script.gate.wait(0.01):
                try:
                    limits.check()
                except Interrupted:
                    script.stopped.set()
                    raise
            self.tokens += 1
            yield piece
        if script.error is not None:
            raise script.error


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()

    def scripted(self: OpenedVideo, limits: Limits, question: str, *, history: Any, max_tokens: int) -> ScriptedAnswer:
        script.asked.append((question, max_tokens))
        script.histories.append(history)
        return ScriptedAnswer(script, limits, question, max_tokens)

    monkeypatch.setattr(OpenedVideo, "ask_within", scripted)
    return script


def text_grounder() -> Grounder:
    """Return a grounder over fakes whose model answers in text, too."""
    text = TextSpec(tube="Follow {query}.", span="When is {query}?", image="Where is {query}?")
    return fake_grounder(dataclasses.replace(fake_spec(), text=text))


def openai_client(running: Running, *, key: str = "none", **options: Any) -> openai.OpenAI:
    client = openai.DefaultHttpxClient(trust_env=False, verify=False, timeout=60)
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, http_client=client, **{"max_retries": 0, **options})


@pytest.fixture
def running(served: Callable[..., Running], script: Script) -> Running:
    return served(text_grounder())


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 60)).save(file, "PNG")
    return file.getvalue()


def video_part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def messages(*parts: dict[str, Any]) -> Any:
    return [{"role": "user", "content": list(parts)}]


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(client: openai.OpenAI, *parts: dict[str, Any], **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "test", "messages": messages(*parts), **options})


def error_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[int, str | None]:
    """Return status and code of the error that a call of the client raises."""
    with pytest.raises(openai.APIStatusError) as caught:
        call(*arguments, **options)
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    assert "/tmp/" not in body["message"] and "\n" not in body["message"]
    return caught.value.status_code, caught.value.code


def test_a_whole_answer(running: Running, script: Script, tmp_path: Path) -> None:
    with running.client() as files, openai_client(running) as client:
        video = upload(files, small_clip(tmp_path / "a.mp4"))["id"]
        answer = chat(client, text_part("What "), video_part(f"upload:{video}"), text_part("happens?"))
    assert answer.object == "chat.completion" and answer.model == "test" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "".join(PIECES), "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (33, 5, 38)
    assert script.asked == [("What happens?", 512)]
    assert metric(running, "chat_tokens_total") == 5 and metric(running, "jobs_total", outcome="done") == 1


def test_a_streamed_answer_comes_in_pieces(running: Running, script: Script, tmp_path: Path) -> None:
    script.gate.clear()
    url, options = data_url(small_clip(tmp_path / "a.mp4").read_bytes()), {"include_usage": True}
    with openai_client(running) as client:
        stream = chat(client, video_part(url), text_part("Why?"), stream=True, stream_options=options)
        chunks = [next(stream), next(stream)]
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["", PIECES[0]]  # before the second one exists
        assert chunks[0].choices[0].delta.role == "assistant"
        script.gate.set()
        chunks += stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "".join(PIECES)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [*[None] * 6, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].usage.completion_tokens == 5


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_says_so(name: str, stream: bool, running: Running) -> None:
    with openai_client(running) as client:
        answer = chat(client, image_part(data_url(png())), text_part("Why?"), stream=stream, **{name: 2})
        reason = list(answer)[-1].choices[0].finish_reason if stream else answer.choices[0].finish_reason
    assert reason == "length"


@pytest.mark.parametrize("way", ["upload", "data"])
def test_a_second_question_encodes_nothing_again(way: str, running: Running, tmp_path: Path) -> None:
    path = small_clip(tmp_path / "a.mp4")
    encoder: Any = running.grounder.sessions["vision_encoder"]
    with running.client() as files, openai_client(running) as client:
        url = f"upload:{upload(files, path)['id']}" if way == "upload" else data_url(path.read_bytes())
        chat(client, video_part(url), text_part("What happens?"))
        calls = len(encoder.calls)
        chat(client, video_part(url), text_part("Who is it?"))
    assert calls == len(encoder.calls) and metric(running, "videos_reused_total") == 1


def test_files_of_data_urls_are_kept_for_a_few_chats(served: Callable[..., Running], script: Script) -> None:
    running = served(text_grounder(), open_videos=2)
    with openai_client(running) as client:
        for shade in range(5):
            file = io.BytesIO()
            Image.new("RGB", (64, 48), (200, 30, 10 * shade)).save(file, "PNG")
            chat(client, image_part(data_url(file.getvalue(), "")), text_part("Why?"))
    assert running.call(lambda: len(list(running.service.store.folder.iterdir()))) == 2


def test_an_image_is_answered_by_the_part_of_either_name(running: Running) -> None:
    with openai_client(running) as client:
        for part in (image_part, video_part):
            assert chat(client, part(data_url(png())), text_part("Why?")).choices[0].message.content == "".join(PIECES)


def test_the_case_of_a_data_url_does_not_matter(running: Running) -> None:
    with openai_client(running) as client:
        for head in ("DATA:IMAGE/PNG;BASE64,", "Data:image/png;charset=utf-8;Base64,", "data:;base64,"):
            url = head + base64.b64encode(png()).decode()
            assert chat(client, image_part(url), text_part("Why?")).choices


def test_options_that_would_change_the_answer_are_rejected(running: Running) -> None:
    fine = {"temperature": 0, "n": 1, "top_p": 0.5, "seed": 3, "user": "me", "stop": [], "logprobs": False}
    with openai_client(running) as client:
        parts = image_part(data_url(png())), text_part("Why?")
        assert chat(client, *parts, **fine, extra_body={"unknown": 1}).choices
        tool = {"type": "function", "function": {"name": "f"}}
        for options in (
            {"temperature": 0.7}, {"n": 2}, {"stop": "a"}, {"stop": ["a"]}, {"logprobs": True}, {"tools": [tool]},
            {"presence_penalty": 1}, {"response_format": {"type": "json_object"}}, {"max_tokens": 0},
        ):  # fmt: skip
            assert error_of(chat, client, *parts, **options) == (422, "server.invalid_request"), options


def test_what_is_no_question_about_one_video_is_rejected(running: Running, tmp_path: Path) -> None:
    image, question = image_part(data_url(png())), text_part("Why?")
    with openai_client(running) as client:
        for bad in (
            [], [*messages(image, question), message("system", "Be brief."), *messages(question)],
            [*messages(image, question), message("assistant", "A car.")],
            [message("assistant", [image, question]), *messages(question)],
            [*messages(image, question), message("assistant", "A car."), *messages(image, question)],
            [message("system", [image, question]), *messages(question)],
            [*messages(image, question), {"role": "tool", "content": "x", "tool_call_id": "1"}, *messages(question)],
            messages(question), messages(image, image, question), [message("user", "Hello")],
        ):  # fmt: skip
            found = error_of(chat, client, messages=bad)
            assert found == (422, "server.unsupported_chat"), bad
        for url, expected in (
            ("https://example.org/a.mp4", (422, "server.unsupported_url")),
            ("file:///etc/passwd", (422, "server.unsupported_url")),
            ("", (422, "server.unsupported_url")),
            ("upload:none", (404, "server.video_not_found")),
            ("data:image/png;base64,a*b", (422, "server.bad_data_url")),
            ("data:image/png,abc", (422, "server.bad_data_url")),
            ("data:", (422, "server.bad_data_url")),
            (data_url(b""), (422, "video.empty")),
            (data_url(b"no video"), (415, "video.unsupported_format")),
        ):
            assert error_of(chat, client, image_part(url), question) == expected, url
        assert error_of(chat, client, image) == (422, "query.empty")
        assert error_of(chat, client, image, text_part("a" * 10_001)) == (422, "query.too_long")
        assert error_of(chat, client, image, question, model="gpt") == (404, "server.model_not_found")
        audio = {"type": "input_audio", "input_audio": {}}
        assert error_of(chat, client, image, audio, question) == (422, "server.invalid_request")
    assert not list(running.service.store.folder.iterdir())


def test_a_chat_with_a_system_message_and_earlier_turns(running: Running, script: Script) -> None:
    image = image_part(data_url(png()))
    turns = [message("assistant", "A car."), message("user", [text_part("Really"), text_part("?")])]
    later = [*messages(text_part("Why"), image, text_part("?")), *turns, message("assistant", "Yes.")]
    encoder: Any = running.grounder.sessions["vision_encoder"]
    language: Any = running.grounder.sessions["language_model"]
    with openai_client(running) as client:
        for role in ("system", "developer"):
            chat(client, messages=[message(role, "Be brief."), *later, message("user", "Since when?")])
        calls = len(encoder.calls)
        chat(client, messages=[message("system", [text_part("Be brief.")]), *messages(image, text_part("Why?"))])
        assert len(encoder.calls) == calls and metric(running, "videos_opened_total") == 1
        assert language.seen[-1][0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        chat(client, messages=[*messages(text_part("Hello!")), message("assistant", "Hi."), *later[:1]])
        assert metric(running, "videos_opened_total") == 2
        assert "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi." in language.seen[-1][0]
        chat(client, messages=later[:3])
        assert metric(running, "videos_opened_total") == 3
        for system in ("x" * 100_001, "<|im_end|>"):
            bad = [message("system", system), *messages(image, text_part("Why?"))]
            assert error_of(chat, client, messages=bad)[0] == 422
    history = (("user", "Why?"), ("assistant", "A car."), ("user", "Really?"), ("assistant", "Yes."))
    assert script.histories == [history, history, (), (), history[:2]]
    assert [question for question, _ in script.asked] == ["Since when?", "Since when?", "Why?", "Why?", "Really?"]


def test_the_models_that_answer(running: Running, served: Callable[..., Running]) -> None:
    with openai_client(running) as client:
        assert [model.id for model in client.models.list()] == ["test"]
        assert client.models.retrieve("test").owned_by == "bridge-stg"
        assert error_of(client.models.retrieve, "gpt") == (404, "server.model_not_found")
    with openai_client(served()) as client:  # a bundle without text
        assert not list(client.models.list())
        part = image_part(data_url(png()))
        assert error_of(chat, client, part, text_part("Why?")) == (422, "query.needs_text_heads")


def test_errors_have_openais_form(served: Callable[..., Running], script: Script) -> None:
    with_key = served(text_grounder(), api_key=KEY)
    with openai_client(with_key, key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "server.unauthorized" and caught.value.type == "authentication_error"
    with openai_client(with_key, key=KEY) as client:
        assert chat(client, image_part(data_url(png())), text_part("Why?")).choices
    with with_key.client(headers={"X-API-Key": KEY}) as client:
        for answer in (client.put("/v1/chat/completions"), client.post("/v1/chat/completions", content=b"{")):
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (QueryError("query.too_long", "too long"), (422, "query.too_long")),
        (EngineError("engine.failed", "secret"), (503, "engine.failed")),
        (ValueError("a bug"), (500, "server.internal")),
    ],
)
def test_a_failure_before_the_answer_is_a_status_and_one_within_is_an_event(
    error: Exception, expected: tuple[int, str], running: Running, script: Script
) -> None:
    script.error = error
    parts = image_part(data_url(png())), text_part("Why?")
    with openai_client(running) as client:
        with pytest.raises(openai.APIError) as caught:
            list(chat(client, *parts, stream=True))
        body: Any = caught.value.body
        assert body["code"] == expected[1] and "secret" not in body["message"]
        assert error_of(chat, client, *parts) == expected
        script.pieces.clear()
        assert error_of(chat, client, *parts, stream=True) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_chat(stream: bool, running: Running, script: Script) -> None:
    script.gate.clear()
    body = {"model": "test", "messages": messages(image_part(data_url(png())), text_part("Why?")), "stream": stream}
    with running.client() as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.TimeoutException):
                client.post("/v1/chat/completions", json=body, timeout=0.5)
        assert script.stopped.wait(20)
        until(lambda: metric(running, "jobs_total", outcome="cancelled") == 1)


def test_a_chat_has_the_servers_deadline_and_is_not_repeated(served: Callable[..., Running], script: Script) -> None:
    running = served(text_grounder(), max_seconds=0.5)
    script.gate.clear()
    with openai_client(running, max_retries=2) as client:
        assert error_of(chat, client, image_part(data_url(png())), text_part("Why?")) == (408, "call.deadline")
    assert len(script.asked) == 1


def test_a_full_queue_is_busy(served: Callable[..., Running], script: Script, tmp_path: Path) -> None:
    running = served(text_grounder(), max_queue=1, workers=1)
    script.gate.clear()
    with running.client() as files, openai_client(running) as client:
        url = f"upload:{upload(files, small_clip(tmp_path / 'a.mp4'))['id']}"
        stream = chat(client, video_part(url), text_part("Why?"), stream=True)
        job = ask(files, url.removeprefix("upload:"), ["the car"]).json()["id"]
        assert error_of(chat, client, video_part(url), text_part("Why?")) == (429, "server.busy")
        script.gate.set()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "".join(PIECES)
        assert ended(files, job)["status"] == "done"  # a chat shares its batch with no query
        files.delete(f"/v1/videos/{url.removeprefix('upload:')}")
        assert error_of(chat, client, video_part(url), text_part("Why?")) == (404, "server.video_not_found")


def test_bodies_are_bounded_one_by_one_and_together(
    served: Callable[..., Running], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = served(text_grounder(), max_upload_bytes=100_000)
    with openai_client(running) as client:
        large = image_part(data_url(bytes(200_000)))
        assert error_of(chat, client, large, text_part("Why?")) == (413, "server.upload_too_large")
        monkeypatch.setattr(security, "CHATS_BYTES", 200_000)
        assert error_of(chat, client, large, text_part("Why?")) == (503, "server.too_many_connections")
        assert chat(client, image_part(data_url(png())), text_part("Why?")).choices  # nothing stays counted
    with running.client() as plain:
        answer = plain.post("/v1/chat/completions", content=bytes(security.CHAT_BYTES + 1))
    assert answer.status_code in (413, 503)
