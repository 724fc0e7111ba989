"""What a watch has done so far, in a few numbers that do not grow with its running time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class LiveStats:
    """Counts and seconds since the watch began.

    Attributes:
        frames: read from the source.
        groups: taken into the window: each was encoded once.
        coarse_frames: samples of these groups.
        dropped_groups: groups that gave way to later ones, unseen: the machine was too slow.
        dropped_coarse_frames: their samples.
        gaps: times the stream had nothing to sample.
        answers: rounds of the standing queries.
        skipped_answers: rounds that fell due while an earlier one, or the window, kept the machine busy.
        late_answers: rounds that were given up at `deadline_s`.
        prefilled_tokens: what the language model was fed for the window, rebuilds included.
        rebuilds: times the window was full.
        encode_s, extend_s, answer_s: seconds in all of the vision encoder, of extending the prefix, of the rounds.
        rebuild_s: seconds in all of rebuilding it; an extension's share of those steps is in it.
        longest_extend_s, longest_rebuild_s, longest_answer_s: of one step. A rebuild's is the spike that comes twice
            a window.
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
        """Seconds that the model took for a coarse frame, everything included."""
        model_s = self.encode_s + self.extend_s + self.rebuild_s + self.answer_s
        return model_s / self.coarse_frames if self.coarse_frames else 0.0

    def add_step(self, timings: dict[str, float], *, rebuilt: bool) -> None:
        """Count a group that was taken into the window."""
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
