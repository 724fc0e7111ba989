"""Compute the ratios of a run, the shares of the machine's limits, and the target of each ratio."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speed.flops import Work, decode_bytes
from speed.measure import REFERENCE, key_of, median

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]

MODEL, FRAMES = "qwen3_vl_0_5b", 32
"""Model and number of coarse frames that the ratios are computed for."""

OWN = ("ours", "torch_eager", "torch_compile")
BEST_FP32, ALLOWED_QUERIES, ALLOWED_OVERHEAD = 0.95, 2.5, 0.03
PEAK_SHARE, BANDWIDTH_SHARE = 0.75, 0.75


@dataclass(frozen=True)
class Limits:
    """Limits of the machine, measured in the same run.

    Attributes:
        bandwidth: bytes per second read from memory.
        fp32, int8: peak operations per second of matmuls.
    """

    bandwidth: float
    fp32: float
    int8: float

    @classmethod
    def best(cls, measured: Sequence[Mapping[str, Any]]) -> Limits:
        """Return the best of several measurements; other load can only lower them."""

        def most(*names: str) -> float:
            return max(found["gemm"][name]["flops"] for found in measured for name in names)

        fastest = max(found["bandwidth"] for found in measured)
        return cls(fastest, most("onnxruntime_fp32", "torch_fp32"), most("onnxruntime_int8"))

    def matmul_peak(self, precision: str) -> float:
        """Return the peak that applies to a precision; int4 weights are multiplied in int8."""
        return self.fp32 if precision == "fp32" else self.int8

    def least_seconds(self, work: Work, precision: str) -> float:
        """Return the seconds of some work at peak rates; attention is always computed in fp32."""
        return work.matmuls / self.matmul_peak(precision) + work.attention / self.fp32


def seconds(rows: Rows, label: str, row: str, *, model: str = MODEL, frames: int = FRAMES) -> float | None:
    """Return the median seconds of a row, or None if it has none."""
    return median(rows.get(key_of(model, frames, label), {}).get(row, {}))


def ratio(over: float | None, under: float | None) -> float | None:
    """Return over / under, or None if one is missing."""
    return None if over is None or not under else round(over / under, 4)


def summed(*values: float | None) -> float | None:
    """Return the sum, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def main_ratios(
    rows: Rows, limits: Limits, text: Mapping[str, Any], past: int, *, model: str = MODEL, frames: int = FRAMES
) -> dict[str, Any]:
    """Return the project's main ratios; a ratio is None if a figure is missing.

    Args:
        rows: measured figures by key and row.
        limits: limits of the machine.
        text: the backbone's `text_config`.
        past: number of cached tokens when decoding starts.
        model: model to compute the ratios for.
        frames: number of coarse frames to compute the ratios for.
    """

    def of(label: str, row: str) -> float | None:
        return seconds(rows, label, row, model=model, frames=frames)

    def both(label: str) -> float | None:
        return summed(of(label, "vision"), of(label, "prefill"))

    found = {
        "prefill_vision_int8_vs_torch_fp32": ratio(both(REFERENCE), both("ours_int8")),
        "end_to_end_int8_vs_torch_fp32": ratio(of(REFERENCE, "end_to_end"), of("ours_int8", "end_to_end")),
        "decode_int8_of_bandwidth": decode_share(rows, limits, text, past, "int8", model=model, frames=frames),
        "eight_queries_over_one": ratio(of("ours_int8", "queries_8"), of("ours_int8", "queries_1")),
        "chain_overhead": chain_overhead(rows, "ours_int8", model=model, frames=frames),
    }
    peers = peer_ratios(rows, model=model, frames=frames)
    best = best_fp32(rows, model=model, frames=frames)
    found["fp32_vs_best_peer"] = min(best.values()) if best else None
    return found | {name: values["mean"] for name, values in peers.items()}


def targets(limits: Limits, *, vnni: bool) -> dict[str, dict[str, Any]]:
    """Return the target of each ratio: `least` or `most`."""
    return {
        "prefill_vision_int8_vs_torch_fp32": {"least": round(PEAK_SHARE * limits.int8 / limits.fp32, 3)},
        "end_to_end_int8_vs_torch_fp32": {"least": 3.0 if vnni else 1.8},
        "decode_int8_of_bandwidth": {"least": BANDWIDTH_SHARE},
        "eight_queries_over_one": {"most": ALLOWED_QUERIES},
        "chain_overhead": {"most": ALLOWED_OVERHEAD},
        "fp32_vs_best_peer": {"least": BEST_FP32},
    }


def met(value: float | None, target: Mapping[str, float]) -> bool | None:
    """Return whether a ratio meets its target, or None if it was not measured."""
    if value is None:
        return None
    return value >= target["least"] if "least" in target else value <= target["most"]


def decode_share(
    rows: Rows, limits: Limits, text: Mapping[str, Any], past: int, precision: str, *, model: str, frames: int
) -> float | None:
    """Return the time to read a token's weights, keys and values at full bandwidth, over the time to decode it."""
    found = rows.get(key_of(model, frames, f"ours_{precision}"), {}).get("decode", {})
    taken = median(found)
    if taken is None or not found.get("tokens"):
        return None
    middle = past + found["tokens"] / 2
    least = decode_bytes(text, int(middle), precision) / limits.bandwidth
    return round(least / (taken / found["tokens"]), 4)


def chain_overhead(rows: Rows, label: str, *, model: str, frames: int) -> float | None:
    """Return end-to-end time over the sum of graphs and video decoding, minus 1: the median of all runs.

    It is negative if stages overlap.
    """
    details = rows.get(key_of(model, frames, label), {}).get("end_to_end", {}).get("details", [])
    found = [one["total"] / (sum(one["graphs"].values()) + video_seconds(one)) - 1 for one in details]
    return round(statistics.median(found), 4) if found else None


def video_seconds(details: Mapping[str, Any]) -> float:
    """Return the seconds that reading and resizing frames took in one run."""
    return sum(value for stage, value in details["timings"].items() if stage in ("decode_video", "decode_fine"))


def engines(rows: Rows, model: str, frames: int) -> dict[str, tuple[str, str]]:
    """Return (engine, precision) by label, for all labels with figures."""
    prefix = f"{model}/{frames}/"
    labels = [key.removeprefix(prefix) for key in rows if key.startswith(prefix)]
    return {label: (label.rpartition("_")[0], label.rpartition("_")[2]) for label in labels}


def peer_ratios(rows: Rows, *, model: str = MODEL, frames: int = FRAMES) -> dict[str, dict[str, Any]]:
    """Return each other engine's time over that of the runner of ours measured with it, at equal precision.

    `mean` is the geometric mean of `rows`, whose keys are `precision/row`.
    """
    found: dict[str, dict[str, float]] = {}
    for label, (engine, precision) in engines(rows, model, frames).items():
        if engine.startswith("ours"):
            continue
        for row, figures in rows[key_of(model, frames, label)].items():
            ours = f"{figures.get('beside', 'ours')}_{precision}"
            mine = seconds(rows, ours, row_of_ours(row, figures), model=model, frames=frames)
            theirs = median(figures)
            if mine and theirs:
                found.setdefault(engine, {})[f"{precision}/{row}"] = round(theirs / mine, 4)
    return {
        engine: {"mean": round(math.exp(statistics.fmean(map(math.log, values.values()))), 4), "rows": values}
        for engine, values in found.items()
    }


def row_of_ours(row: str, figures: Mapping[str, Any]) -> str:
    """Return our row that a peer's row is compared with; text-only prefill is compared with text-only prefill."""
    return "prefill_text" if row == "prefill" and figures.get("text_alone") else row


def best_fp32(rows: Rows, *, model: str = MODEL, frames: int = FRAMES) -> dict[str, float]:
    """Return the fastest other engine's fp32 time over ours, by row."""
    found: dict[str, float] = {}
    for values in peer_ratios(rows, model=model, frames=frames).values():
        for name, value in values["rows"].items():
            precision, _, row = name.partition("/")
            if precision == "fp32":
                found[row] = min(value, found.get(row, math.inf))
    return found
