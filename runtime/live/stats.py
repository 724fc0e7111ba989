"""Counts and times of a watch, in constant memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class LiveStats:
    """Counts and seconds since the watch began.

    Attributes:
        frames: frames read from the source.
        groups: groups added to the window; each was encoded once.
        coarse_frames: samples of these groups.
        dropped_groups: groups replaced by later ones before the model used them, since the machine was too slow.
        dropped_coarse_frames: samples of the dropped groups.
        gaps: number of gaps in the stream.
        answers: rounds of the standing queries.
        skipped_answers: rounds left out because the machine was busy when they were due.
        late_answers: rounds stopped at `deadline_s`.
        prefilled_tokens: tokens prefilled for the window, including rebuilds.
        rebuilds: number of times that the window was full.
        encode_s, extend_s, answer_s: total seconds of the vision encoder, of extending the prefix, of the rounds.
        rebuild_s: total seconds of rebuilding the prefix, including the new group of that step.
        longest_extend_s, longest_rebuild_s, longest_answer_s: longest single step, in seconds. Rebuilds cause a latency
            peak twice per window.
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
        if rebuilt:
            took = timings.get("rebuild", 0.0)
            self.rebuilds += 1
            self.rebuild_s += took
            self.longest_rebuild_s = max(self.longest_rebuild_s, took)
        else:
            took = timings.get("prefill", 0.0)
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
