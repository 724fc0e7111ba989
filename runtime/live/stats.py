"""Counts and times of a watch, in constant memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class LiveStats:
    """Counts and seconds since the watch began.

    Attributes:
        frames: frames read from the source.
        groups, coarse_frames: groups added to the window, and their samples; each was encoded once.
        dropped_groups, dropped_coarse_frames: those replaced by later ones, since the machine was too slow.
        gaps: number of gaps in the stream.
        answers, late_answers: rounds of the standing queries, and those of them that were stopped at `deadline_s`.
        skipped_answers: rounds left out because the machine was busy when they were due.
        round_s: stream time between two rounds: `every_s`, or the length of a group if that is longer, since nothing
            new is known before its end; 0 before the first group.
        latency_median_s, latency_p95_s: seconds from the arrival of the newest frame that a round saw to its answers,
            over the newest 1000 rounds.
        prefilled_tokens: tokens prefilled for the window, including rebuilds.
        rebuilds: number of times that the window was full.
        encode_s, extend_s, rebuild_s, answer_s: total seconds of encoding, extending and rebuilding, and of the rounds.
        longest_extend_s, longest_rebuild_s, longest_answer_s: longest single step, in seconds.
        ended: why the watch ended: "" while it runs, then "source", "stopped", "duration" or "error".
    """

    frames: int = 0
    groups: int = 0
    coarse_frames: int = 0
    dropped_groups: int = 0
    dropped_coarse_frames: int = 0
    gaps: int = 0
    answers: int = 0
    skipped_answers: int = 0
    late_answers: int = 0
    round_s: float = 0.0
    latency_median_s: float = 0.0
    latency_p95_s: float = 0.0
    prefilled_tokens: int = 0
    rebuilds: int = 0
    encode_s: float = 0.0
    extend_s: float = 0.0
    rebuild_s: float = 0.0
    answer_s: float = 0.0
    longest_extend_s: float = 0.0
    longest_rebuild_s: float = 0.0
    longest_answer_s: float = 0.0
    ended: str = ""

    @property
    def cost_s(self) -> float:
        """Average seconds of model time per coarse frame."""
        model_s = self.encode_s + self.extend_s + self.rebuild_s + self.answer_s
        return model_s / self.coarse_frames if self.coarse_frames else 0.0

    def add_step(self, timings: dict[str, float], *, rebuilt: bool) -> None:
        """Count a group that was added to the window."""
        self.groups += 1
        self.encode_s += timings.get("vision_coarse", 0.0)
        took = timings.get("rebuild" if rebuilt else "prefill", 0.0)
        if rebuilt:
            self.rebuilds += 1
            self.rebuild_s += took
            self.longest_rebuild_s = max(self.longest_rebuild_s, took)
        else:
            self.extend_s += took
            self.longest_extend_s = max(self.longest_extend_s, took)

    def add_answers(self, seconds: float) -> None:
        """Count a round of the standing queries."""
        self.answers += 1
        self.answer_s += seconds
        self.longest_answer_s = max(self.longest_answer_s, seconds)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`."""
        values = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return {**values, "cost_s": round(self.cost_s, 6)}
