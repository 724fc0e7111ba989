"""Simulate a run of `infer-many --executor ray` over a million videos, from measured times of its stages.

Simulated are the driver, which sends one unit after the other and stores its rows; storage, whose bandwidth all nodes
share; workers that read a video, search its windows and answer its queries; videos of very different lengths; and nodes
that fail and come back. Units that were running on such a node are started again, at most `ATTEMPTS` times in all, as
the executor does it. Not simulated: the start of Ray and of the models, network latency, and memory.

    python benchmarks/scale/simulate.py --nodes 1 10 100
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.evaluation.run.ray_executor import ATTEMPTS

RESULTS = Path(__file__).parents[1] / "results"
HOUR = 3600.0


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a unit take on one worker.

    Attributes:
        window: to encode and prefill one window, and answer that a target is absent.
        found: more for a window in which a target is found: its boxes.
        query: more for each further query on a window.
        decode: to decode a second of video.
        unit: of the driver, to send a unit and take its answer.
        row: of the driver, to write a row to disk.
        window_s: length of a window in seconds of video.
        overlap: share of a window that the next one repeats.
    """

    window: float
    found: float
    query: float
    decode: float = 0.035  # 0.07 CPU seconds of PyAV for H.264 of 1920x1080 at 25 per second, on 2 cores
    unit: float = 0.0016  # 30,000 empty units on a local Ray with two workers, docs/scale.md
    row: float = 0.0005
    window_s: float = 16.0
    overlap: float = 0.25

    def seconds(self, video_s: np.ndarray, queries: np.ndarray, found: float) -> np.ndarray:
        """Return the seconds [N] for videos [N] with numbers of queries [N], of whose targets a share is found."""
        step = self.window_s * (1 - self.overlap)
        windows = 1 + np.ceil(np.maximum(video_s - self.window_s, 0) / step)
        return (
            video_s * self.decode + windows * (self.window + self.query * (queries - 1)) + self.found * found * queries
        )


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        nodes: number of nodes.
        workers: workers of a node.
        videos: number of videos, each one unit.
        mean_s: mean length of a video in seconds.
        sigma: spread of the lengths, which are log-normal.
        queries: most queries on a video; they are uniform from 1 on.
        found: share of the queries whose target is found.
        bytes_per_s: bytes of a second of video.
        storage: bytes per second that all nodes together read.
        failures: failures of a node in a day.
        repair_s: seconds until a failed node is back.
        longest_first: whether the longest videos are sent first, instead of in random order.
    """

    nodes: int
    workers: int = 32
    videos: int = 1_000_000
    mean_s: float = 300.0
    sigma: float = 1.2
    queries: int = 3
    found: float = 0.5
    bytes_per_s: float = 5e5
    storage: float = 2e9
    failures: float = 0.05
    repair_s: float = 600.0
    longest_first: bool = False


def measured_costs(model: str) -> Costs:
    """Return the costs of a model in int8 at 32 coarse frames, on 2 cores, from `results/speed.json`."""
    speed = json.loads((RESULTS / "speed.json").read_text())
    rows = {
        row["row"]: row["seconds"] for row in speed["rows"]
        if (row["model"], row["frames"], row["runner"], row["precision"]) == (model, 32, "ours", "int8")
    }  # fmt: skip
    whole, window = rows["end_to_end"], rows["vision"] + rows["prefill"] + rows["decode"]
    return Costs(window=window, found=whole - window, query=(rows["queries_8"] - rows["queries_1"]) / 7)


def simulate(costs: Costs, setting: Setting, seed: int = 0) -> dict[str, Any]:
    """Return what a run takes: hours in all, until 99 % of the videos, of the driver and of storage; lost units."""
    rng = np.random.default_rng(seed)
    mean = np.log(setting.mean_s) - setting.sigma**2 / 2
    video_s = rng.lognormal(mean, setting.sigma, setting.videos).clip(1, 24 * HOUR)
    if setting.longest_first:
        video_s = np.sort(video_s)[::-1]
    queries = rng.integers(1, setting.queries + 1, setting.videos)
    work = costs.seconds(video_s, queries, setting.found).tolist()
    read = (video_s * setting.bytes_per_s / setting.storage).tolist()
    stored = (costs.row * queries).tolist()
    fails = [rng.exponential(24 * HOUR / max(setting.failures, 1e-9)) for _ in range(setting.nodes)]
    free = [(0.0, node) for node in range(setting.nodes) for _ in range(setting.workers)]
    heapq.heapify(free)
    new, again, attempts = iter(range(setting.videos)), deque[tuple[float, int]](), dict[int, int]()
    ends = np.zeros(setting.videos)
    driver = storage = 0.0
    lost = killed = 0
    while True:
        start, node = heapq.heappop(free)
        if again and again[0][0] <= start:
            _, unit = again.popleft()
        elif (one := next(new, None)) is not None:
            unit = one
        elif again:
            start, unit = again.popleft()
        else:
            break
        driver = max(driver, start) + costs.unit + stored[unit]
        start = max(start, driver)
        while fails[node] <= start:  # this worker was not at a unit then
            start = max(start, fails[node] + setting.repair_s)
            fails[node] += setting.repair_s + rng.exponential(24 * HOUR / setting.failures)
        storage = max(storage, start) + read[unit]
        end = max(start + work[unit], storage)
        if fails[node] < end:
            killed += 1
            attempts[unit] = attempts.get(unit, 0) + 1
            if attempts[unit] < ATTEMPTS:
                again.append((fails[node], unit))
            else:
                lost += 1
            heapq.heappush(free, (fails[node] + setting.repair_s, node))
            continue  # the node's other workers meet the same failure: it stays in `fails` until one starts after it
        ends[unit] = end
        heapq.heappush(free, (end, node))
    total = float(ends.max())
    workers = setting.nodes * setting.workers
    driver_s = setting.videos * costs.unit + sum(stored)
    limits = {"workers": sum(work) / workers, "storage": sum(read), "driver": driver_s, "longest video": max(work)}
    return {
        "hours": total / HOUR,
        "hours_99": float(np.quantile(ends, 0.99)) / HOUR,
        "workers_busy": sum(work) / (total * workers),
        "limited_by": max(limits, key=limits.__getitem__),
        "least_hours": {name: seconds / HOUR for name, seconds in limits.items()},
        "units_killed": killed,
        "units_lost": lost,
    }


def main() -> None:
    """Print a table, and write it with all settings to `results/scale.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--videos", type=int, default=Setting.videos)
    parser.add_argument("--model", default="qwen3_vl_0_5b", help="a model of results/speed.json")
    parser.add_argument("--storage", type=float, default=Setting.storage, help="bytes per second of all nodes together")
    parser.add_argument("--failures", type=float, default=Setting.failures, help="failures of a node in a day")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    given = parser.parse_args()
    costs, rows = measured_costs(given.model), []
    for nodes in given.nodes:
        for longest_first in (False, True):
            setting = Setting(
                nodes, videos=given.videos, storage=given.storage, failures=given.failures, longest_first=longest_first
            )
            began = time.monotonic()
            found = simulate(costs, setting, given.seed)
            rows.append({"setting": asdict(setting), **found})
            order = "longest first" if longest_first else "random order"
            hours = f"{found['hours']:9.1f} h (99 % after {found['hours_99']:.1f} h)"
            units = f"{found['units_killed']} units killed, {found['units_lost']} lost"
            busy = f"workers busy {found['workers_busy']:.0%}, limited by {found['limited_by']}"
            print(f"{nodes:4} nodes, {order}: {hours}, {busy}, {units}; took {time.monotonic() - began:.0f} s")
    given.out.write_text(json.dumps({"model": given.model, "seed": given.seed, "costs": asdict(costs), "runs": rows},
                                    indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
