"""A long video of held-out demo scenes with empty gaps.

A still camera shows each scene: its things move for 6 to 12 s, and before and after them the background is empty. The
queries name the looks that occur most often. Occurrences are cut to the clip: what happens in the gaps cannot be seen
in the clip alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from compare import Expected

from bridge_stg.demo.sprites import COLOUR_NAMES, NAMES
from bridge_stg.demo.synthetic import Scene, Thing, make_scene
from bridge_stg.runtime import Grounder

SIZE, RATE, QUERIES = (320, 320), 8, 8
GAP_S = (2.0, 14.0)  # before and after the things of a scene


@dataclasses.dataclass(frozen=True)
class Segment:
    """A scene, and where it is in the video: the start of its background, and the empty seconds around its things."""

    scene: Scene
    start_s: float
    lead_s: float
    tail_s: float

    @property
    def things_s(self) -> tuple[float, float]:
        """Time of the video in which the things move."""
        start_s = self.start_s + self.lead_s
        return start_s, start_s + self.scene.duration

    @property
    def end_s(self) -> float:
        """End of the segment."""
        return self.things_s[1] + self.tail_s


class Scenes:
    """The video, of at least some minutes."""

    def __init__(self, *, minutes: float, seed: int) -> None:
        rng, at = np.random.default_rng(seed), 0.0
        self.segments: list[Segment] = []
        while at < 60 * minutes:
            scene = make_scene(rng, split="held_out", frame_rate=RATE, size=SIZE, twins=0.0)
            scene = dataclasses.replace(scene, drift=0.0, noise=0.0)
            lead, tail = (round(float(rng.uniform(*GAP_S)) * RATE) / RATE for _ in range(2))
            self.segments.append(Segment(scene, at, lead, tail))
            at = self.segments[-1].end_s
        looks = Counter(_look(thing) for segment in self.segments for thing in segment.scene.things)
        self.queries = [look for look, _ in looks.most_common(QUERIES)]
        self.frames = round(at * RATE)

    @property
    def facts(self) -> dict[str, float]:
        """What the video has, for the figures."""
        return {"seconds": self.frames / RATE, "frames": self.frames, "clips": len(self.segments)}

    def write(self, path: Path) -> None:
        """Encode the segments, one after the other."""
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            stream.options = {"crf": "23", "preset": "veryfast"}
            for segment in self.segments:
                for image in _frames(segment):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))

    def expected(self, grounder: Grounder, folder: Path, **options: float) -> dict[str, Expected]:
        """Return the spans that are found in each clip alone, and those of the things."""
        clips: Expected = {query: [] for query in self.queries}
        things: Expected = {query: [] for query in self.queries}
        for segment in self.segments:
            start_s, times = segment.things_s[0], np.arange(round(segment.scene.duration * RATE)) / RATE
            with grounder.open(zip(times.tolist(), segment.scene.render(times, *SIZE), strict=True)) as video:
                for found in video.ground_many(self.queries):
                    if found.span is not None and found.scores["presence"] >= 0.5:
                        span = found.span[0] + start_s, found.span[1] + start_s
                        clips[found.query].append((span, segment.things_s))
            for thing in segment.scene.things:
                if _look(thing) in things:
                    things[_look(thing)].append(((start_s + thing.start, start_s + thing.end), segment.things_s))
        return {"of_single_clips": clips, "of_the_scenes": things}


def _look(thing: Thing) -> str:
    return f"the {COLOUR_NAMES[thing.colour]} {NAMES[thing.name]}"


def _frames(segment: Segment) -> Iterator[np.ndarray]:
    """Yield the frames of a segment; the empty ones are the scene without its things."""
    empty = dataclasses.replace(segment.scene, things=()).render([0.0], *SIZE)[0]
    yield from [empty] * round(segment.lead_s * RATE)
    times = np.arange(round(segment.scene.duration * RATE)) / RATE
    for start in range(0, len(times), 16):
        yield from segment.scene.render(times[start : start + 16], *SIZE)
    yield from [empty] * round(segment.tail_s * RATE)
