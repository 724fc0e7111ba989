"""Definitions of what `watch` writes and live sources of the server send."""

from __future__ import annotations

from collections.abc import Mapping

from bridge_stg.evaluation.schema.kinds import Schema, list_of, of, record, ref
from bridge_stg.evaluation.schema.results import BOX_AT, ORIGIN
from bridge_stg.runtime.live.events import KINDS

EVENT = {
    "event": of(
        "string",
        "`appeared`: a span is newer than every reported one; `moved`: the box overlaps the last reported one too "
        "little; `left`: the span ended.",
        enum=list(KINDS),
    ),
    "query": of("string", "The standing query."),
    "time_s": of("number", "Time of the event in the stream, in seconds."),
    "wall_time": of(
        "string?",
        "When the frame of the event arrived, ISO 8601 in UTC; of a file that is read as fast as possible, when the "
        "newest frame of the round was read.",
    ),
    "known_s": of("number", "Time up to which the model had seen the stream when it detected the event."),
    "box": BOX_AT["box"],
    "span": ref("span", "The span of the answer that shows the event, in time of the stream.", null=True),
    "scores": ref("scores", "Probabilities of this answer."),
    "tube": list_of("computed_box", "The computed boxes of this answer.", null=True),
}

ROUND = {
    "known_s": of("number", "Time up to which the model has seen the stream, in seconds."),
    "window": ref("span", "Start and end of the window that was searched."),
    "behind_s": of("number", "Seconds of the stream that were read after `known_s` by the end of the round."),
    "took_s": of("number", "Seconds that the round took.", minimum=0),
    "wall_time": of("string", "When the newest frame of the window arrived, ISO 8601 in UTC."),
    "latency_s": of("number", "Seconds from the arrival of this frame to the answers.", minimum=0),
    "groundings": list_of("result", "The answers, in the order of the queries; times are times of the stream."),
    "events": list_of("event", "The new events in order of time."),
}

WATCHED = {
    **{
        name: of("integer", text, minimum=0)
        for name, text in {
            "frames": "Frames read from the source.",
            "groups": "Groups of samples added to the window.",
            "coarse_frames": "Samples of these groups.",
            "dropped_groups": "Groups dropped for later ones because the machine was too slow.",
            "dropped_coarse_frames": "Samples of the dropped groups.",
            "gaps": "Gaps in the stream.",
            "answers": "Rounds of the standing queries.",
            "skipped_answers": "Rounds left out because the machine was busy when they were due.",
            "late_answers": "Rounds that were stopped at their deadline.",
            "prefilled_tokens": "Tokens prefilled for the window, including rebuilds.",
            "rebuilds": "Number of times that the window was full.",
        }.items()
    },
    **{
        name: of("number", text, minimum=0)
        for name, text in {
            "encode_s": "Seconds of encoding samples.",
            "extend_s": "Seconds of extending the prefix.",
            "rebuild_s": "Seconds of rebuilding it.",
            "answer_s": "Seconds of the rounds.",
            "longest_extend_s": "The longest extension.",
            "longest_rebuild_s": "The longest rebuild.",
            "longest_answer_s": "The longest round.",
            "cost_s": "Average seconds of the model per sample.",
            "round_s": "Time of the stream between two rounds.",
            "latency_median_s": "Median seconds from the arrival of the newest frame of a round to its answers.",
            "latency_p95_s": "95th percentile of the same.",
        }.items()
    },
    "ended": of("string", "Why the watch ended.", enum=["source", "stopped", "duration", "error"]),
}

WRITTEN = of("string", "When the line was written, ISO 8601 in UTC.")


def _tagged(tag: str, text: str, fields: Mapping[str, Schema]) -> Schema:
    """Return a line of `watch` whose field `event` is `tag`."""
    return record(text, {"event": of("string", f"Always `{tag}`.", const=tag), **fields})


LIVE: Mapping[str, Schema] = {
    "watch_line": {
        "description": "A line of `watch --jsonl`: `start`, then events and, with --answers, rounds, then `end`.",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in ("watch_start", "event", "watch_answers", "watch_end")],
    },
    "watch_start": _tagged(
        "start",
        "The first line of a watch.",
        {
            "wall_time": WRITTEN,
            "queries": of("array", "The standing queries.", items={"type": "string"}),
            **ORIGIN,
        },
    ),
    "event": record("A target that appeared, moved or left. The server sends it as `event`.", EVENT),
    "round": record("The answers to the standing queries at one time. The server sends it as `update`.", ROUND),
    "watch_answers": _tagged("answers", "A round, as a line.", ROUND),
    "watch_end": _tagged(
        "end", "The last line of a watch: its counts, and seconds in total.", {"wall_time": WRITTEN, **WATCHED}
    ),
}
"""The definitions by name."""
