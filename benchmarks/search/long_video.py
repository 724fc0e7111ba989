"""Search a long video that is made of clips and gaps, twice with an index, and compare with each clip alone.

    python benchmarks/search/long_video.py --minutes 120 --out benchmarks/results/search.json
    python benchmarks/search/long_video.py --minutes 120 --clips assets/demo/clips --out benchmarks/results/search.json

The first joins held-out scenes of the demo with their empty backgrounds, the second any clips with black and grey gaps.
The figures of both are kept in the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare import compare
from joined_clips import GREYS, JoinedClips
from scenes import Scenes

from bridge_stg.demo.bundle import demo_bundle
from bridge_stg.runtime import Grounder, SearchResult
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.search.occurrences import score_of
from bridge_stg.runtime.video.decoder import Decoder

SEED = 20_260_412
SCORES = (0.0, 0.05, 0.1)  # least scores to report
WINDOW_S = 12.0  # the longest clips of the demo's training


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

    def largest_mb(self, first: float, end: float) -> float | None:
        """Return the most MB in a part of the video, given as shares of its length; None for too short a search."""
        last = self.samples[-1][0] if self.samples else 0.0
        inside = [count for at, count in self.samples if first * last <= at <= end * last]
        return round(max(inside) / 1e6, 1) if inside else None


def measured(
    grounder: Grounder, path: Path, queries: list[str], **options: Any
) -> tuple[list[SearchResult], dict[str, Any]]:
    """Search the video; return the results, and what it took."""
    decoded, frames = 0, Decoder.frames

    def counted(self: Decoder) -> Iterator[Any]:
        nonlocal decoded
        for frame in frames(self):
            decoded += 1
            yield frame

    Decoder.frames = counted  # type: ignore[method-assign]
    began, cpu = time.perf_counter(), time.process_time()
    with Memory() as memory:

        def progress(_stage: str, done: float, _total: float | None) -> None:
            memory.video_s = done

        results = grounder.search(path, queries, progress=progress, **options)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    Decoder.frames = frames  # type: ignore[method-assign]
    return results, {
        "wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1), "decoded_frames": decoded,
        "memory_mb": {"first_half": memory.largest_mb(0.1, 0.5), "second_half": memory.largest_mb(0.5, 1.0)},
    }  # fmt: skip


def mb_of(index: Path, kind: str) -> float:
    """Return the megabytes of one kind of files in an index."""
    return sum(file.stat().st_size for file in index.rglob(f"{kind}-*")) / 1e6


def rows(results: list[SearchResult]) -> list[dict[str, Any]]:
    """Return what must be the same in two searches."""
    return [{**result.to_json(), "timings_s": None} for result in results]


def main() -> None:
    """Make the video, search it, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--clips", type=Path, metavar="FOLDER", help="join these mp4 files instead of demo scenes")
    parser.add_argument("--gaps", nargs="+", choices=list(GREYS), default=list(GREYS), help="between --clips")
    parser.add_argument("--window", type=float, default=WINDOW_S)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--cuts", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made: Scenes | JoinedClips = Scenes(minutes=options.minutes, seed=SEED)
    if options.clips:
        made = JoinedClips(options.clips, options.gaps, minutes=options.minutes, seed=SEED)
    searched = {"window_s": options.window, "overlap": options.overlap, "cuts": options.cuts}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with Grounder.load(demo_bundle(), threads=options.threads) as grounder:
            expected = made.expected(grounder, folder, **searched)
        made.write(folder / "long.mp4")
        with Grounder.load(demo_bundle(), threads=options.threads, index=folder / "index") as grounder:
            results, first = measured(grounder, folder / "long.mp4", made.queries, **searched)
            print("first run:", first, file=sys.stderr)
            stored = {kind: mb_of(folder / "index", kind) for kind in ("groups", "fine-maps")}
            again, second = measured(grounder, folder / "long.mp4", made.queries, **searched)
    figures = {
        "video": made.facts,
        "queries": made.queries,
        "windows": results[0].windows.to_json() | {"absent": [result.windows.absent for result in results]},
        **{
            name: {least: compare(results, spans, least) for least in SCORES if least == 0 or name != "of_single_clips"}
            for name, spans in expected.items()
        },
        "scores": {result.query: [round(score_of(one), 3) for one in result.occurrences] for result in results},
        "first_run": first,
        "second_run": second | {"same_results": rows(again) == rows(results)},
        "second_of_first": {name: round(second[name] / first[name], 3) for name in ("wall_s", "cpu_s")},
        "index_mb_per_hour": {kind: round(mb / made.facts["seconds"] * 3600, 1) for kind, mb in stored.items()},
    }
    print(json.dumps(figures, indent=1))
    if options.out:
        kept = json.loads(options.out.read_bytes()) if options.out.exists() else {}
        kept["joined_clips" if options.clips else "scenes"] = figures
        with replacing(options.out) as new:
            new.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
