"""A grounder that answers without a bundle, and a check of the errors of commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from bridge_stg import cli
from bridge_stg.runtime.backends.choose import ChosenBackend
from bridge_stg.runtime.chain.results import Grounding, Tube
from bridge_stg.runtime.errors import QueryError
from bridge_stg.runtime.video.token_budget import CoarseChoice
from tests.fakes.chain import fake_spec

SIZE = (64, 48)
COUNTS = {"calls": 7, "tokens": 90, "forced": 20, "drafted": 70, "accepted": 60, "truncated": 1}
TIMES = np.arange(20) / 10


class FakeVideo:
    """Answers every query with the same tube; a ghost is not found."""

    heads = "bridge"

    def __enter__(self) -> FakeVideo:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def ground_many(self, queries: Sequence[str], **options: Any) -> list[Grounding]:
        options["progress"]("answer", 1, len(queries))
        return [self.ground(query) for query in queries]

    def ground(self, query: str, **options: Any) -> Grounding:
        times = TIMES[4:16:2]
        presence = np.linspace(0.4, 1, len(times)).astype(np.float32)
        boxes = np.tile(np.array([10, 10, 30, 30], np.float32), (len(times), 1))
        tube = Tube(times=times, boxes=boxes, presence=presence, visible=presence >= 0.5)
        found = query != "the ghost"
        return Grounding(
            query=query,
            found=found,
            span=(0.4, 1.6) if found else None,
            tube=tube if found else None,
            boxes=tube.at(TIMES[4:16]) if found else None,
            size=SIZE,
            coarse=CoarseChoice(fps=2.0, size=(64, 48), groups=8, tokens=64, max_visual_tokens=None),
            answer="",
            named_span=None,
            scores={"absent": 0.25, "answer": 0.5, "presence": 0.7},
            tokens={"coarse": 64, "fine": 128, "dense": 1024, "ratio": 0.1875},
            timings={"answer": 0.01, "total": 0.25},
            heads=self.heads,
            mode="joint" if self.heads == "text" else "",
            decoding=COUNTS if self.heads == "text" else {},
        )


class FakeGrounder(FakeVideo):
    """Records how it was loaded, opened and asked."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    verified = True
    spec = fake_spec()
    bundle: ClassVar[dict[str, str]] = {"name": "b", "fingerprint": "f" * 64}
    target = ChosenBackend("tensorrt", "10.15.1", {"language_model": "standard"}, "Orin (SM 87)", "requested")

    @classmethod
    def load(cls, path: Any, **options: Any) -> FakeGrounder:
        cls.calls.append((path, options))
        grounder = cls()
        grounder.heads = options.get("heads") or cls.heads
        return grounder

    def open(self, video: str, **options: Any) -> FakeVideo:
        self.calls.append((video, options))
        video = FakeVideo()
        video.heads = self.heads
        return video

    def check_query(self, query: str) -> None:
        return

    def ask(self, video: str, question: str, **options: Any) -> Iterator[str]:
        self.calls.append((video, question, options))
        if question == "nothing":
            raise QueryError("query.needs_text_heads", "nothing answers")
        yield from ("A red", " car", " – 🚗")


def complaint(arguments: Sequence[object], capsys: pytest.CaptureFixture[str], *, code: str) -> str:
    """Run a command that must fail, check its exit code, its line on stderr and its JSON, and return the line."""
    assert cli.run([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    line = output.err.rstrip("\n").splitlines()[-1]  # after a usage error's usage
    found = re.fullmatch(r"Error: (.*) \[([a-z_.]+)\]", line)
    assert found and found[2] == code and "Traceback" not in output.err
    shown = [json.loads(text) for text in output.out.splitlines()]
    error = {"error": {"code": found[2], "message": found[1]}}
    assert shown == ([error] if {"--json", "--jsonl"} & set(arguments) else [])
    return line
