"""Measure the seconds of each stage on the same clips, with both bundles side by side: separate runs are too noisy."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_stg.calibration.options import load_arguments
from bridge_stg.evaluation.run.evaluate import run_task
from bridge_stg.evaluation.samples import Sample
from bridge_stg.evaluation.stage_times import StageTimes
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.grounder import Grounder


def stage_seconds(
    bundles: Mapping[str, Path], samples: Sequence[Sample], *, options: Mapping[str, Any], side_by_side: bool = True
) -> dict[str, Any]:
    """Return the median seconds of each stage by bundle, and the number of measured `clips`.

    All samples are grounded as tubes. The first one warms the sessions up and does not count; those that fail are left
    out. Bundles are open at the same time if `side_by_side`, otherwise one after the other, to save memory.
    """
    loaded = load_arguments(options)
    groups = [list(bundles)] if side_by_side else [[label] for label in bundles]
    taken = {label: StageTimes() for label in bundles}
    clips = 0
    for labels in groups:
        clips = 0
        with contextlib.ExitStack() as stack:
            opened = {label: stack.enter_context(Grounder.load(bundles[label], **loaded)) for label in labels}
            for place, sample in enumerate(samples):
                tube = dataclasses.replace(sample, task="tube")
                try:
                    truth = tube.read_truth()
                    found = {label: run_task(g, tube, truth, allow_none=False).timings for label, g in opened.items()}
                except BridgeError:
                    continue
                clips += bool(place)
                for label, timings in found.items() if place else ():
                    taken[label].add(timings)
    return {**{label: times.percentile(50) for label, times in taken.items()}, "clips": clips}
