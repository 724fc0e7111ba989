"""A long video that joins short clips, with gaps of one colour between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from compare import Expected, Span
from PIL import Image

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.video.playback import play

SIZE, RATE = (640, 360), 8
GAP_S = (2, 14)  # whole seconds
GREYS = {"black": 0, "grey": 128}
QUERIES = (
    "the blue bird", "the white dog", "the bus", "the dog", "the bird", "the white bus", "the red car",
    "the yellow ball",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A clip, or the seconds of a gap with the name of its colour, and where it is in the video."""

    what: Path | tuple[str, int]
    start_s: float


class JoinedClips:
    """The video. Clips of other sizes are letterboxed.

    Args:
        folder: folder of the clips, mp4.
        gaps: colours of the gaps, names in `GREYS`.
        minutes: least length.
        seed: seed of the random order of clips and gaps.
    """

    def __init__(self, folder: Path, gaps: list[str], *, minutes: float, seed: int) -> None:
        rng, clips = np.random.default_rng(seed), sorted(folder.glob("*.mp4"))
        self._frames = {clip: list(_letterboxed(clip)) for clip in clips}
        self.parts: list[Part] = []
        self.queries = list(QUERIES)
        self.frames = 0
        while self.frames < 60 * minutes * RATE:
            gap = gaps[int(rng.integers(len(gaps)))], int(rng.integers(GAP_S[0], GAP_S[1] + 1))
            for what in (gap, clips[int(rng.integers(len(clips)))]):
                self.parts.append(Part(what, self.frames / RATE))
                self.frames += self._length(what)

    @property
    def facts(self) -> dict[str, float]:
        """What the video has, for the figures."""
        gaps = sum(not isinstance(part.what, Path) for part in self.parts)
        return {"seconds": self.frames / RATE, "frames": self.frames, "clips": len(self.parts) - gaps, "gaps": gaps}

    def write(self, path: Path) -> None:
        """Encode the video."""
        self._encode([part.what for part in self.parts], path)

    def expected(self, grounder: Grounder, folder: Path, **options: float) -> dict[str, Expected]:
        """Return what a search finds in each clip and in each gap that is a file of its own."""
        spans: Expected = {query: [] for query in self.queries}
        alone: dict[Path | tuple[str, int], dict[str, list[Span]]] = {}
        for what in {part.what: None for part in self.parts}:
            self._encode([what], folder / "alone.mp4")
            results = grounder.search(folder / "alone.mp4", self.queries, **options)
            alone[what] = {one.query: [found.span for found in one.occurrences if found.span] for one in results}
        for part in self.parts:
            whole = part.start_s, part.start_s + self._length(part.what) / RATE
            for query, found in alone[part.what].items():
                spans[query] += [((start + whole[0], end + whole[0]), whole) for start, end in found]
        return {"of_single_clips": spans}

    def _length(self, what: Path | tuple[str, int]) -> int:
        return len(self._frames[what]) if isinstance(what, Path) else what[1] * RATE

    def _encode(self, parts: list[Path | tuple[str, int]], path: Path) -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            stream.options = {"crf": "18", "preset": "veryfast"}
            for what in parts:
                frames = self._frames[what] if isinstance(what, Path) else _gap(*what)
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


def _gap(colour: str, seconds: int) -> list[np.ndarray]:
    return [np.full((*SIZE[::-1], 3), GREYS[colour], np.uint8)] * (seconds * RATE)


def _letterboxed(clip: Path) -> Iterator[np.ndarray]:
    with play(clip) as playback:
        for frame in playback.frames_at(np.arange(round((playback.duration_s or 0.0) * RATE)) / RATE):
            height, width = frame.shape[:2]
            scale = min(SIZE[0] / width, SIZE[1] / height)
            image = Image.fromarray(frame).resize((round(width * scale), round(height * scale)))
            canvas = Image.new("RGB", SIZE)
            canvas.paste(image, ((SIZE[0] - image.width) // 2, (SIZE[1] - image.height) // 2))
            yield np.asarray(canvas)
