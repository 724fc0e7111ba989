"""Fakes for live tests: a language model that reads brightness, sessions that count calls, and test streams."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.host.memory import peak_bytes
from bridge_stg.runtime.live.stats import LiveStats
from tests.fakes.chain import (
    VOCAB,
    FakeCache,
    FakeLanguageModel,
    FakeSpatialDecoder,
    FakeTokenizer,
    FakeVisionEncoder,
    fake_spec,
)

TIME = re.compile(r"<[0-9.]+ seconds>")


class SeeingLanguageModel(FakeLanguageModel):
    """Language model that answers with the last run of bright groups, as a trained model would for a white target."""

    def scripted(self, visible: np.ndarray) -> np.ndarray:
        wish = np.zeros(VOCAB, np.float32)
        text = self.tokenizer.decode(visible[:, 0])
        prompt, marker, written = text.rpartition("<|im_start|>assistant\n")
        if marker:
            bright = visible[visible[:, 1] > 0, 1].reshape(len(TIME.findall(prompt)), -1).mean(axis=1) > 70_000
            answer = self.named(TIME.findall(prompt), bright)
            if answer.startswith(written) and answer != written:
                wish[self.tokenizer.encode(answer[len(written) :])[0]] = 50
        return wish

    @staticmethod
    def named(times: list[str], bright: np.ndarray) -> str:
        if not bright.any():
            return "none"
        last = first = int(np.flatnonzero(bright)[-1])
        while first and bright[first - 1]:
            first -= 1
        return f"{times[first]} to {times[last]}"


class Counting:
    """Session that counts its inputs without keeping them, so that it can run for an hour."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.graph, self.preferences, self.device = session.graph, session.preferences, None
        self.calls = self.tokens = self.frames = 0
        self.allocated = 0

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: Any = None) -> dict[str, np.ndarray]:
        self.calls += 1
        self.tokens += feeds["input_ids"].size if "input_ids" in feeds else 0
        self.frames += len(feeds["frames"]) if "frames" in feeds else 0
        self.session.before(feeds)
        outputs = self.session.run(feeds, cache)
        getattr(self.session, "seen", []).clear()
        return outputs

    def allocate_cache(self, *, batch: int, capacity: int) -> FakeCache:
        self.allocated += 1
        return FakeCache(batch, capacity)

    def close(self) -> None:
        self.session.closed = True


def live_grounder(spec: ModelSpec | None = None, *, seeing: bool = True, **options: Any) -> Grounder:
    """Return a Grounder over counting fake sessions, available as `grounder.sessions`."""
    spec = spec or fake_spec()
    tokenizer: Any = FakeTokenizer()
    language = (SeeingLanguageModel if seeing else FakeLanguageModel)(tokenizer)
    sessions: dict[str, Any] = {
        "vision_encoder": Counting(FakeVisionEncoder(spec)),
        "language_model": Counting(language),
        "spatial_decoder": Counting(FakeSpatialDecoder()),
    }
    return Grounder(sessions, spec, tokenizer, **options)


def stream(
    seconds: float, *, bright: tuple[tuple[float, float], ...] = (), fps: float = 8.0, start_s: float = 0.0
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (time, frame): white while the target is visible, black otherwise; made on demand."""
    frames = {shown: np.full((48, 64, 3), 255 if shown else 0, np.uint8) for shown in (True, False)}
    for i in range(int(seconds * fps)):
        time = i / fps
        yield start_s + time, frames[any(low <= time < high for low, high in bright)]


def watch_for_an_hour() -> tuple[list[int], LiveStats]:
    """Watch an hour of a stream; return the resident bytes after each minute from the sixth on, and the counts."""
    measured: list[int] = []
    grounder = live_grounder(seeing=False)
    with grounder.watch(stream(3600, fps=4.0), ["the car", "a dog"], window_s=8) as watch:
        for update in watch:
            if update.known_s >= 360 and update.known_s % 60 == 0:
                measured.append(resident_bytes())
    return measured, watch.stats


def resident_bytes() -> int:
    """Return the resident memory of this process; its peak where the system does not tell."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if not statm.exists():  # not Linux
        return peak_bytes()
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
