"""The log of a stage: figures and events in a file, lines for people, and the curves of a tracker."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bridge_stg.training.folder import LOG, TEXT_LOG
from bridge_stg.training.loop.distribution import Processes


class StageLogger:
    """The log of the stage `name` in a training's folder; only the main process writes."""

    def __init__(self, name: str, folder: Path, processes: Processes) -> None:
        self.name, self.folder, self.processes = name, folder, processes

    def write(self, **values: Any) -> None:
        """Append values to the log, and pass figures and metrics to the tracker, but not events."""
        if self.processes.is_main:
            self._append(LOG, json.dumps({"stage": self.name, **rounded(values)}))
        if "event" in values:
            return
        numbers = values | values.get("validation", {})
        scalars = {f"{self.name}/{k}": v for k, v in numbers.items() if isinstance(v, (int, float))}
        self.processes.accelerator.log(scalars, step=values["step"])

    def print(self, text: str, *, in_bar: bool = False) -> None:
        """Append a line to the text log, and print it, unless a progress bar shows the same (`in_bar`)."""
        if self.processes.is_main:
            text = f"{self.name}: {text}"
            self._append(TEXT_LOG, text)
            if not (in_bar and sys.stderr.isatty()):
                with tqdm.external_write_mode():
                    print(text, flush=True)

    def _append(self, file_name: str, line: str) -> None:
        with open(self.folder / file_name, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def summed(figures: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, int]]:
    """Return sum and count of each figure."""
    totals: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for one in figures:
        totals.update(one)
        counts.update(one.keys())
    return {name: (totals[name], counts[name]) for name in counts}


def merged_means(parts: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Return the mean of each figure over sums and counts of several processes."""
    names = dict.fromkeys(name for part in parts for name in part)
    pairs = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: sum(total for total, _ in found) / sum(count for _, count in found) for name, found in pairs.items()}


def rounded(value: Any) -> Any:
    """Return JSON values with six significant digits, and None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: rounded(member) for name, member in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def duration(seconds: float) -> str:
    """Return a duration in words, such as `2 h 10 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


@contextmanager
def progress_bar(name: str, *, unit: str, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal until the end of the block; yield a function of (done, total) that moves it."""
    with tqdm(desc=name, unit=unit, leave=False, disable=not (show and sys.stderr.isatty())) as bar:

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move
