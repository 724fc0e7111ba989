"""Search a long video made of held-out demo scenes with empty gaps, and compare with what is found in the single clips.

    python benchmarks/search/long_video.py --minutes 20 --out benchmarks/results/search.json

A still camera shows each scene: its things move for 6 to 12 s, and before and after them the background is empty. The
queries name the looks that occur most often. An occurrence counts as found if its span, cut to the clip, overlaps that
of the same query in the clip alone with an IoU of 0.5 or more: what happens in the gaps cannot be seen in the clip.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from bridge_stg.demo.bundle import demo_bundle
from bridge_stg.demo.sprites import COLOUR_NAMES, NAMES
from bridge_stg.demo.synthetic import Scene, make_scene
from bridge_stg.runtime import Grounder, SearchResult
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.search.occurrences import score_of
from bridge_stg.runtime.video.decoder import Decoder

SEED, SIZE, RATE = 20_260_412, (320, 320), 8
GAP_S = (2.0, 14.0)  # before and after the things of a scene
QUERIES, SAME_TIME = 8, 0.5
Span = tuple[float, float]
Expected = dict[str, list[tuple[Span, "Clip"]]]
"""By query, the spans in the long video, each with its clip."""
SCORES = (0.0, 0.05, 0.1)  # least scores to report
WINDOW_S = 12.0  # the longest clips of the demo's training


@dataclasses.dataclass(frozen=True)
class Clip:
    """A scene, and where it is in the video: the start of the segment with its background, and of its things."""

    scene: Scene
    start_s: float
    lead_s: float
    tail_s: float

    @property
    def things_s(self) -> float:
        """Time at which the clip alone would start."""
        return self.start_s + self.lead_s

    def cut(self, span: Span) -> Span:
        """Return the part of a span of the long video in which the things move; it may be empty."""
        end_s = self.things_s + self.scene.duration
        return min(max(span[0], self.things_s), end_s), max(min(span[1], end_s), self.things_s)

    @property
    def end_s(self) -> float:
        """End of the segment."""
        return self.things_s + self.scene.duration + self.tail_s


def clips_of(minutes: float) -> list[Clip]:
    """Return the segments of a video of at least this length."""
    rng, clips = np.random.default_rng(SEED), []
    at = 0.0
    while at < 60 * minutes:
        scene = make_scene(rng, split="held_out", frame_rate=RATE, size=SIZE, twins=0.0)
        scene = dataclasses.replace(scene, drift=0.0, noise=0.0)
        lead, tail = (round(float(rng.uniform(*GAP_S)) * RATE) / RATE for _ in range(2))
        clips.append(Clip(scene, at, lead, tail))
        at = clips[-1].end_s
    return clips


def write_video(clips: list[Clip], path: Path) -> None:
    """Encode the segments, one after the other."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        for clip in clips:
            for image in frames_of(clip):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def frames_of(clip: Clip) -> Iterator[np.ndarray]:
    """Yield the frames of a segment; the empty ones are the scene without its things."""
    empty = dataclasses.replace(clip.scene, things=()).render([0.0], *SIZE)[0]
    for _ in range(round(clip.lead_s * RATE)):
        yield empty
    times = np.arange(round(clip.scene.duration * RATE)) / RATE
    for start in range(0, len(times), 16):
        yield from clip.scene.render(times[start : start + 16], *SIZE)
    for _ in range(round(clip.tail_s * RATE)):
        yield empty


def queries_of(clips: list[Clip]) -> list[str]:
    """Return queries about the looks that occur most often."""
    looks = Counter((thing.colour, thing.name) for clip in clips for thing in clip.scene.things)
    return [f"the {COLOUR_NAMES[colour]} {NAMES[name]}" for (colour, name), _ in looks.most_common(QUERIES)]


def single_clips(grounder: Grounder, clips: list[Clip], queries: list[str]) -> Expected:
    """Return the spans that are found in each clip alone."""
    spans: Expected = {query: [] for query in queries}
    for clip in clips:
        times = np.arange(round(clip.scene.duration * RATE)) / RATE
        with grounder.open(zip(times.tolist(), clip.scene.render(times, *SIZE), strict=True)) as video:
            for found in video.ground_many(queries):
                if found.span is not None and found.scores["presence"] >= 0.5:
                    span = found.span[0] + clip.things_s, found.span[1] + clip.things_s
                    spans[found.query].append((span, clip))
    return spans


def true_spans(clips: list[Clip], queries: list[str]) -> Expected:
    """Return the spans in which the things that the queries name are in the video."""
    spans: Expected = {query: [] for query in queries}
    for clip in clips:
        for thing in clip.scene.things:
            query = f"the {COLOUR_NAMES[thing.colour]} {NAMES[thing.name]}"
            if query in spans:
                spans[query].append(((clip.things_s + thing.start, clip.things_s + thing.end), clip))
    return spans


def compare(results: list[SearchResult], expected: Expected, least: float) -> dict[str, Any]:
    """Return recall and precision of the occurrences with this score or more, and what was missed or not expected."""
    compared = {result.query: unmatched(result, expected[result.query], least) for result in results}
    wanted = sum(map(len, expected.values()))
    matched = wanted - sum(len(missed) for missed, _ in compared.values())
    found = matched + sum(len(extra) for _, extra in compared.values())
    return {
        "expected": wanted, "occurrences": found, "matched": matched,
        "recall": round(matched / wanted, 4), "precision": round(matched / max(found, 1), 4),
        "missed": {query: missed for query, (missed, _) in compared.items() if missed},
        "not_expected": {query: extra for query, (_, extra) in compared.items() if extra},
    }  # fmt: skip


def unmatched(result: SearchResult, expected: list[tuple[Span, Clip]], least: float) -> tuple[list[Span], list[Span]]:
    """Return the expected spans that no other occurrence shows, and the occurrences that were not expected."""
    left, missed = [one.span for one in result.occurrences if one.span is not None and score_of(one) >= least], []
    for span, clip in expected:
        best = max(left, key=lambda other: overlap(span, clip.cut(other)), default=None)
        if best is not None and overlap(span, clip.cut(best)) >= SAME_TIME:
            left.remove(best)
        else:
            missed.append(span)
    return missed, left


def overlap(one: Span, other: Span) -> float:
    """Return the IoU of two spans."""
    common = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return common / (max(one[1], other[1]) - min(one[0], other[0]))


class Memory:
    """Resident bytes of this process, sampled once a second, with the video's time."""

    def __init__(self) -> None:
        self.video_s = 0.0
        self.samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self.samples.append((self.video_s, pages * 4096))

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()

    def largest_mb(self, first: float, end: float) -> float:
        """Return the most MB in a part of the video, given as shares of its length."""
        last = self.samples[-1][0]
        inside = [count for at, count in self.samples if first * last <= at <= end * last]
        return round(max(inside) / 1e6, 1)


def main() -> None:
    """Make the video, search it, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--window", type=float, default=WINDOW_S)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    clips = clips_of(options.minutes)
    queries = queries_of(clips)
    decoded = 0
    frames = Decoder.frames

    def counted(self: Decoder) -> Iterator[Any]:
        nonlocal decoded
        for frame in frames(self):
            decoded += 1
            yield frame

    with tempfile.TemporaryDirectory() as folder, Grounder.load(demo_bundle(), threads=options.threads) as grounder:
        path = Path(folder) / "long.mp4"
        write_video(clips, path)
        Decoder.frames = counted  # type: ignore[method-assign]
        began, cpu = time.perf_counter(), time.process_time()
        with Memory() as memory:

            def progress(_stage: str, done: float, _total: float | None) -> None:
                memory.video_s = done

            results = grounder.search(
                path, queries, window_s=options.window, overlap=options.overlap, progress=progress
            )
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        expected = single_clips(grounder, clips, queries)
    figures = {
        "video": {"seconds": clips[-1].end_s, "frames": round(clips[-1].end_s * RATE), "clips": len(clips)},
        "queries": queries,
        "windows": results[0].windows.to_json() | {"absent": [result.windows.absent for result in results]},
        "of_single_clips": compare(results, expected, 0.0),
        "of_the_scenes": {least: compare(results, true_spans(clips, queries), least) for least in SCORES},
        "scores": {result.query: [round(score_of(one), 3) for one in result.occurrences] for result in results},
        "decoded_frames": decoded,
        "wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1),
        "memory_mb": {"first_half": memory.largest_mb(0.1, 0.5), "second_half": memory.largest_mb(0.5, 1.0)},
    }  # fmt: skip
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out:
        with replacing(options.out) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
