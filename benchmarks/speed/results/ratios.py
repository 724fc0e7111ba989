"""Compute the ratios of a run, the shares of the machine's limits, and the target of each ratio."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speed.flops import WEIGHT_BYTES, Work, decode_bytes, prefill_work, vision_work
from speed.measure import REFERENCE, key_of, median
from speed.results.growth import summary

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]

MODEL, FRAMES = "qwen3_vl_0_5b", 32
"""Model and number of coarse frames that the ratios are computed for."""
LARGE = "qwen3_vl_2b"
"""Model of the ratios whose name ends with `_2b`."""
PEAK_SHARE = 0.75
MEANINGS = {
    "end_to_end_int8_vs_torch_fp32": "whole call: time of eager torch in fp32 ÷ time of int8 here",
    "end_to_end_int8_vs_torch_fp32_2b": "the same for the 2B model",
    "prefill_vision_int8_vs_torch_fp32": "the same for vision and prefill together",
    "decode_int8_of_bandwidth": "decoding in int8: share of the speed that the memory's bandwidth allows",
    "decode_int8_of_bandwidth_2b": "the same for the 2B model",
    "vision_int8_of_peak": "vision in int8: share of the speed that the peak of matmuls allows",
    "prefill_int8_of_peak": "the same for prefill",
    "decode_int4_vs_genai": "decoding in int4: time of onnxruntime-genai ÷ time here",
    "decode_int4_vs_int8": "decoding: time of int8 ÷ time of int4",
    "prefill_int4_vs_int8": "prefill: time of int8 ÷ time of int4",
    "fp32_vs_best_peer": "time of the fastest peer ÷ time here, in the row of fp32 where this is least",
    "int8_vs_best_peer": "the same in int8",
    "growth_of_last_doubling": "largest power of the last doubling in the table of growth; 1: in proportion",
    "eight_queries_over_one": "time of 8 queries on one video ÷ time of 1, in int8",
    "chain_overhead": "share of the whole call, in int8, that is added to graphs and video decoding",
    "cold_start_demo_fp32_s": "seconds of a whole `infer` process on a sample clip, demo in fp32: the best run",
    "cold_start_demo_int8_s": "the same in int8",
}
"""What each ratio compares; other names are peers."""
PEER_MEANING = "time of this runner ÷ time here in equal precision, geometric mean of the rows that both have"


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
        """Return the best matmuls of several measurements, which other load can only lower, and the median bandwidth.

        Machines that share a host share its memory: a sample may see a bandwidth that was there for its seconds only.
        """

        def most(*names: str) -> float:
            return max(found["gemm"][name]["flops"] for found in measured for name in names)

        bandwidth = statistics.median(found["bandwidth"] for found in measured)
        return cls(bandwidth, most("onnxruntime_fp32", "torch_fp32"), most("onnxruntime_int8"))

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
    rows: Rows, limits: Limits, facts: Mapping[str, Mapping[str, Any]], growth: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the project's main ratios; a ratio is None if a figure is missing.

    Args:
        rows: measured figures by key and row.
        limits: limits of the machine.
        facts: model/frames → the backbone's configuration and the input sizes; see `report.flat_rows`.
        growth: measured points of all axes.
    """

    def of(label: str, row: str, model: str = MODEL) -> float | None:
        return seconds(rows, label, row, model=model)

    def both(label: str) -> float | None:
        return summed(of(label, "vision"), of(label, "prefill"))

    def share(row: str, model: str = MODEL) -> float | None:
        found, fact = rows.get(key_of(model, FRAMES, "ours_int8"), {}).get(row, {}), facts.get(f"{model}/{FRAMES}")
        return share_of_limit(row, median(found), found, fact, "int8", limits)

    peers = peer_ratios(rows)
    best = {precision: best_peer(rows, precision) for precision in ("fp32", "int8")}
    powers = [found["last_step"] for found in summary(growth).values() if found["last_step"] is not None]
    return {
        "end_to_end_int8_vs_torch_fp32": ratio(of(REFERENCE, "end_to_end"), of("ours_int8", "end_to_end")),
        "end_to_end_int8_vs_torch_fp32_2b": ratio(
            of(REFERENCE, "end_to_end", LARGE), of("ours_int8", "end_to_end", LARGE)
        ),
        "prefill_vision_int8_vs_torch_fp32": ratio(both(REFERENCE), both("ours_int8")),
        "decode_int8_of_bandwidth": share("decode"),
        "decode_int8_of_bandwidth_2b": share("decode", LARGE),
        "vision_int8_of_peak": share("vision"),
        "prefill_int8_of_peak": share("prefill"),
        "decode_int4_vs_genai": peers.get("genai", {}).get("rows", {}).get("int4/decode"),
        "decode_int4_vs_int8": ratio(of("ours_int8", "decode"), of("ours_int4", "decode")),
        "prefill_int4_vs_int8": ratio(of("ours_int8", "prefill"), of("ours_int4", "prefill")),
        "fp32_vs_best_peer": min(best["fp32"].values(), default=None),
        "int8_vs_best_peer": min(best["int8"].values(), default=None),
        "growth_of_last_doubling": max(powers, default=None),
        "eight_queries_over_one": ratio(of("ours_int8", "queries_8"), of("ours_int8", "queries_1")),
        "chain_overhead": chain_overhead(rows, "ours_int8", model=MODEL, frames=FRAMES),
    } | {name: values["mean"] for name, values in peers.items()}


def targets(limits: Limits, *, vnni: bool) -> dict[str, dict[str, Any]]:
    """Return the target of each ratio: `least` or `most`. Without VNNI, int8 is worth half as much."""
    least = {
        "end_to_end_int8_vs_torch_fp32": 3.8 if vnni else 1.8,
        "end_to_end_int8_vs_torch_fp32_2b": 3.5 if vnni else 1.8,
        "prefill_vision_int8_vs_torch_fp32": round(PEAK_SHARE * limits.int8 / limits.fp32, 3),
        "decode_int8_of_bandwidth": 0.7,
        "decode_int8_of_bandwidth_2b": 0.75,
        "vision_int8_of_peak": 0.65,
        "prefill_int8_of_peak": 0.65,
        "decode_int4_vs_genai": 1.0,
        "decode_int4_vs_int8": 1.25,
        "prefill_int4_vs_int8": 0.9,
        "fp32_vs_best_peer": 1.0,
        "int8_vs_best_peer": 1.0,
    }
    most = {
        "growth_of_last_doubling": 1.1,
        "eight_queries_over_one": 1.2,
        "chain_overhead": 0.03,
        "cold_start_demo_fp32_s": 0.8,
        "cold_start_demo_int8_s": 0.8,
    }
    return {k: {"least": v} for k, v in least.items()} | {k: {"most": v} for k, v in most.items()}


def met(value: float | None, target: Mapping[str, float]) -> bool | None:
    """Return whether a ratio meets its target, or None if it was not measured."""
    if value is None:
        return None
    return value >= target["least"] if "least" in target else value <= target["most"]


def share_of_limit(
    row: str,
    taken: float | None,
    figures: Mapping[str, Any],
    fact: Mapping[str, Any] | None,
    precision: str,
    limits: Limits,
) -> float | None:
    """Return the shortest time that the machine's limits allow for a row's work, over its measured time."""
    if taken is None or fact is None or precision not in WEIGHT_BYTES:
        return None
    sizes = fact["sizes"]
    if row == "vision":
        work = vision_work(fact["vision_config"], sizes["groups"], sizes["rows"], sizes["columns"])
        return round(limits.least_seconds(work, precision) / taken, 4)
    if row in ("prefill", "prefill_text"):
        return round(limits.least_seconds(prefill_work(fact["text_config"], sizes["length"]), precision) / taken, 4)
    if row == "decode" and figures.get("tokens"):
        past = int(sizes["length"] + figures["tokens"] / 2)
        least = decode_bytes(fact["text_config"], past, precision) / limits.bandwidth
        return round(least * figures["tokens"] / taken, 4)
    return None


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


def best_peer(rows: Rows, kind: str, *, model: str = MODEL, frames: int = FRAMES) -> dict[str, float]:
    """Return the fastest other engine's time over ours in one precision, by row."""
    found: dict[str, float] = {}
    for values in peer_ratios(rows, model=model, frames=frames).values():
        for name, value in values["rows"].items():
            precision, _, row = name.partition("/")
            if precision == kind:
                found[row] = min(value, found.get(row, math.inf))
    return found
