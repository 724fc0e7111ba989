"""Definitions of results: what `infer`, `infer-many`, `watch`, `bench`, `doctor`, `estimate` and the server write."""

from __future__ import annotations

from collections.abc import Mapping

from bridge_stg.evaluation.schema.kinds import Schema, counts, list_of, of, record, ref
from bridge_stg.runtime.bundle.spec import HEADS
from bridge_stg.runtime.chain.results import SCHEMA
from bridge_stg.runtime.chain.tasks import TASKS
from bridge_stg.runtime.live.events import KINDS
from bridge_stg.runtime.video.decoder import CLOCKS
from bridge_stg.runtime.video.token_budget import LIMITS

BOX_AT = {
    "time_s": of("number", "Seconds from the first frame of the video; of a live stream, time of the stream."),
    "box": of(
        "array", "Left, top, right and bottom in pixels of the video as displayed.", items={"type": "number"},
        minItems=4, maxItems=4,
    ),
    "presence": of("number", "Probability that the target is in the frame; of text heads 1.", minimum=0, maximum=1),
    "visible": of("boolean", "Whether presence is at least the model's threshold."),
}  # fmt: skip

ORIGIN = {
    "schema": of("integer", "Version of this format.", const=SCHEMA),
    "program": ref("program", "What computed the results."),
    "bundle": ref("bundle", "The bundle that was run; null: the graphs are not from a bundle.", null=True),
    "engine": ref("engine", "The backend that ran the graphs, and why; null: unknown.", null=True),
    "source": of("string", "The video, image or stream, as given; user and password of an address are left out."),
    "options": of("object", "The options that may change the answers, by their names in the API."),
}

RESULT = {
    "schema": of("integer", "Version of this format.", const=SCHEMA),
    "task": of(
        "string",
        "`tube`: when and where; `span`: only when; `image`: where, in an image that shows the target; `track`: from "
        "a box in the first frame.",
        enum=list(TASKS),
    ),
    "query": of("string", "The query, as given; of a track without one, `the object`."),
    "unknown_words": of(
        "array",
        "Words of the query, casefolded, that the bundle says its model does not know; empty if it does not say which "
        "it knows.",
        items={"type": "string"},
    ),
    "found": of("boolean", "Whether the target is in the video."),
    "span": ref(
        "span",
        "When the target is there: `named_span` after presence moved its ends; with text heads, as named. Of a track, "
        "from the start to where the target leaves; of an image, the nominal time of one frame. Null: not found.",
        null=True,
    ),
    "named_span": ref("span", "The span that the answer names, before presence moved its ends.", null=True),
    "answer": of(
        "string",
        "What the language model wrote, such as `<2.2 seconds> to <4.2 seconds>` or `none`; its times count from "
        "the start of the window in a search and in a live stream.",
    ),
    "heads": of(
        "string",
        "What computed the boxes: `bridge`, the bridging queries and the spatial decoder; `text`, the language model.",
        enum=list(HEADS),
    ),
    "mode": of(
        "string",
        "How text heads answered: `joint`, all boxes in one answer; `two-step`, the span, then a box per frame; `span` "
        "or `image`, one answer. Empty with bridge heads.",
        enum=["", "joint", "two-step", "span", "image"],
    ),
    "decoding": ref("decoding", "Counts of a text answer; an empty object with bridge heads."),
    "size": ref("size", "The video as displayed: upright, with square pixels. Boxes are in these pixels."),
    "coarse": ref("coarse", "The frames that the language model got."),
    "clock": of(
        "string",
        "Where times come from: `timestamps`, time stamps of all frames; `frame_rate`, partly the frame rate that the "
        "file states; `guessed`, partly an assumed rate, or corrected time stamps.",
        enum=list(CLOCKS),
    ),
    "stream": of("integer?", "Index of the video stream that was read; null: the file has only one.", minimum=0),
    "scores": ref("scores", "Probabilities of the answer."),
    "tube": list_of("computed_box", "The boxes as computed, one per fine frame. Null: none, as for `span`.", null=True),
    "boxes": list_of(
        "frame_box",
        "A box for every frame of the video in the span; of a track, for every frame. Null where `tube` is null.",
        null=True,
    ),
    "tokens": ref("tokens", "Visual tokens computed for this query."),
    "timings_s": ref("timings", "Seconds of the stages."),
}

SEARCHED = {
    "score": of(
        "number",
        "Rank of the occurrence: (1 − `absent`) · `answer` · `presence` of its `scores`; without boxes, presence "
        "counts as 1.",
        minimum=0,
        maximum=1,
    ),
    "occurrences": list_of(
        "occurrence", "All occurrences of the target, best first; the other fields are those of the best one."
    ),
    "windows": ref("windows", "The windows of the search."),
}
"""Fields that the result of a search has too."""

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

ROW = {
    "id": of("string", "Id of the query: that of the table, else the line's number; in a folder, file and number."),
    "index": of("integer", "Place among the queries.", minimum=0),
    "video": of("string", "The video or image, as the table names it."),
    "task": RESULT["task"],
    "query": RESULT["query"],
    "first_box": of("array", "Of a track: the box in the first frame, as given.", items={"type": "number"}),
}


def _tagged(tag: str, text: str, fields: Mapping[str, Schema]) -> Schema:
    """Return a line of `watch` whose field `event` is `tag`."""
    return record(text, {"event": of("string", f"Always `{tag}`.", const=tag), **fields})


RESULTS: Mapping[str, Schema] = {
    "document": record(
        "What `infer --json` writes: where the results come from, and one result per query.",
        {**ORIGIN, "results": list_of("result", "The results, in the order of the queries.")},
    ),
    "result": record(
        "The answer to one query: in `infer --json`, in `infer-many`'s rows, in the server's `results`, from Triton, "
        "and from `Grounding.to_json`.",
        {**RESULT, **SEARCHED},
        optional=tuple(SEARCHED),
    ),
    "occurrence": record(
        "One time at which the target is in a video that was searched window by window.",
        {
            "score": SEARCHED["score"],
            **{name: RESULT[name] for name in ("span", "named_span", "answer", "scores", "tube", "boxes")},
        },
    ),
    "windows": record(
        "The windows of a search.",
        {
            "count": of("integer", "How many there were.", minimum=1),
            "length_s": of("number", "Seconds of a window.", minimum=0),
            "overlap_s": of("number", "Seconds that a window has in common with the next one.", minimum=0),
            "absent": of("integer", "Windows without the target.", minimum=0),
            "shots": of("integer", "Shots of the video; no window crosses a cut. With `--no-cuts`, 1.", minimum=1),
        },
    ),
    "span": record(
        "A time span in seconds from the first frame of the video, half-open: a frame at `end_s` is not part of it.",
        {"start_s": of("number", "Start in seconds."), "end_s": of("number", "End in seconds, not included.")},
    ),
    "size": record(
        "Width and height in pixels.",
        {"width": of("integer", "Width.", minimum=1), "height": of("integer", "Height.", minimum=1)},
    ),
    "computed_box": record("A box that the model computed, on one fine frame.", BOX_AT),
    "frame_box": record(
        "A box on one frame of the video, interpolated between two computed ones where that is needed.",
        {**BOX_AT, "interpolated": of("boolean", "Whether the box was not computed on this very frame.")},
    ),
    "scores": record(
        "Probabilities, from 0 to 1. They are not calibrated.",
        {
            name: of("number", text, minimum=0, maximum=1)
            for name, text in {
                "absent": "Probability of the answer that the target is absent, also where it was found.",
                "answer": "Probability of the answer among all that the grammar allows; with text heads, the geometric "
                "mean of the probabilities of its tokens.",
                "presence": "Mean presence over the tube; 0 if not found; with text heads 1 where boxes were listed.",
            }.items()
        },
    ),
    "coarse": record(
        "How the video was sampled for the language model.",
        {
            "fps": of("number", "Samples per second."),
            "size": ref("size", "Size of the samples."),
            "groups": of("integer", "Groups of samples, each with its own time in the prompt.", minimum=1),
            "tokens": of("integer", "Visual tokens of all groups.", minimum=1),
            "max_visual_tokens": of("integer?", "The maximum that was requested; null: none."),
            "limited_by": of(
                "array",
                "The limits that made samples fewer or smaller than the model's own rate and size; empty: none did.",
                items={"enum": list(LIMITS)},
            ),
        },
    ),
    "tokens": record(
        "Visual tokens.",
        {
            "coarse": of("integer", "Of the coarse frames.", minimum=0),
            "fine": of("integer", "Of the fine frames in which boxes were computed.", minimum=0),
            "dense": of("integer", "Of the whole video at the fine rate and size.", minimum=0),
            "ratio": of("number", "(coarse + fine) / dense.", minimum=0),
        },
    ),
    "timings": counts(
        "Seconds. A stage that did not run is left out; others may follow. `total` is at least the sum of the others.",
        {
            "decode_video": "Decoding and sampling the video; spent once per video, and shared by its queries.",
            "vision_coarse": "Encoding the coarse frames; once per video.",
            "prefill": "Prefilling the video's part of the prompt; once per video.",
            "answer": "The language model's answer; belongs to the call, and is shared by queries answered together.",
            "decode_fine": "Decoding the fine frames; of the call.",
            "vision_fine": "Encoding the fine frames; of the call.",
            "spatial": "The spatial decoder; of the call.",
            "boxes": "The boxes of the mode `two-step`; of the call.",
            "total": "The whole call, and the stages of the video if it was opened before the call. Each query on an "
            "opened video has these stages in its total, so totals must not be added up.",
        },
        "number",
        optional=True,
    ),
    "decoding": counts(
        "Counts of a text answer; an empty object with bridge heads.",
        {
            "calls": "Calls of the language model.",
            "tokens": "Tokens of the answer.",
            "forced": "Tokens that the grammar left no choice about.",
            "drafted": "Tokens that were drafted.",
            "accepted": "Drafted tokens that the model accepted.",
            "truncated": "Answers that the maximum of tokens cut.",
        },
        "integer",
        optional=True,
    ),
    "program": record(
        "This program.", {"name": of("string", "Its name.", const="bridge-stg"), "version": of("string", "Version.")}
    ),
    "bundle": record(
        "A bundle.",
        {
            "name": of("string", "Name of its folder."),
            "fingerprint": of("string", "SHA-256 over the hashes of its files: equal fingerprints, equal graphs."),
        },
    ),
    "engine": record(
        "The backend that was chosen.",
        {
            "backend": of("string", "Name, such as `onnxruntime`."),
            "version": of("string", "Version of its package."),
            "device": of("string", "The GPU, or `CPU`."),
            "variants": of("object", "Variant of each graph.", additionalProperties={"type": "string"}),
            "reason": of("string", "Why it was chosen."),
        },
    ),
    "line": {
        "description": "A line of `infer --jsonl`.",
        "anyOf": [{"$ref": "#/$defs/answered_line"}, {"$ref": "#/$defs/failed_line"}],
    },
    "answered_line": record(
        "A result and what it comes from.",
        {
            "video": ORIGIN["source"],
            **{name: ORIGIN[name] for name in ("program", "bundle", "options")},
            **RESULT,
            **SEARCHED,
        },
        optional=tuple(SEARCHED),
    ),
    "failed_line": record(
        "A query whose source could not be read.",
        {
            "video": ORIGIN["source"],
            "query": RESULT["query"],
            "error": ref("problem", "Why."),
        },
    ),
    "problem": record(
        "An error.",
        {
            "code": of("string", "Stable dotted code; see [troubleshooting](troubleshooting.md)."),
            "message": of("string", "One paragraph; its wording may change."),
        },
    ),
    "table_header": record(
        "The first line of `infer-many`'s JSON lines: what must agree when the run is resumed, and the program.",
        {
            "schema": of("integer", "Version of this line's format.", const=1),
            "program": ref("program", "What began the file."),
            "bundle": of("string", "Name of the bundle's folder."),
            "task": RESULT["task"],
            "allow_none": of("boolean", "Whether the answer may be that the target is absent."),
            "max_visual_tokens": of("integer?", "See `coarse`."),
            "stream": of("integer?", "The video stream that was requested."),
            "window": {
                "type": ["number", "string"],
                "description": "Seconds of a window, `auto` or `whole`; missing: `auto`.",
            },
            "cuts": of("boolean", "Whether a search finds hard cuts; missing: true."),
            "top": of("integer?", "Most occurrences per query in a video that is searched; null or missing: all."),
            "model": of("object", "Fingerprint of the bundle, backend, variants and options of text heads."),
        },
        optional=("window", "cuts", "top"),
    ),
    "table_row": {
        "description": "A line of `infer-many` after the first one, and a row of its Parquet table.",
        "anyOf": [{"$ref": "#/$defs/answered_row"}, {"$ref": "#/$defs/failed_row"}],
    },
    "answered_row": record("A query and its result.", {**ROW, **RESULT, **SEARCHED}, optional=("first_box", *SEARCHED)),
    "failed_row": record(
        "A query that failed.",
        {**ROW, "error": of("string", "Why: kind of the error and message.")},
        optional=("first_box",),
    ),
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
    "bench": record(
        "What `bench --json` writes. All seconds are wall time, and medians and 95th percentiles are over the calls.",
        {
            **ORIGIN,
            "machine": of("object", "Processor, cores, system, Python and packages."),
            "load_average": of(
                "array?",
                "Load of the machine at the end, over 1, 5 and 15 minutes; null: not known.",
                items={"type": "number"},
            ),
            "load_s": of("number", "Seconds to load the bundle, with the import of the backend's package.", minimum=0),
            "first_answer_s": of(
                "number", "Seconds from the start of loading to the first answer on the first video.", minimum=0
            ),
            "rows": list_of("bench_row", "One row per video."),
        },
    ),
    "bench_row": record(
        "The figures of one video.",
        {
            "coarse_frames": of("integer", "Coarse frames that were encoded.", minimum=1),
            "tokens": record(
                "Visual tokens, `coarse` and `fine`, and tokens of the `answer`.",
                {name: of("integer", "Tokens.", minimum=0) for name in ("coarse", "fine", "answer")},
            ),
            "stages": of(
                "object",
                "`median_s` and `p95_s` of each stage and of `total`, by the names of `timings`.",
                additionalProperties=record(
                    "Seconds.", {name: of("number", "Seconds.", minimum=0) for name in ("median_s", "p95_s")}
                ),
            ),
            "tokens_per_s": of(
                "object",
                "Tokens per second: coarse visual tokens in `vision_coarse` and in `prefill`; tokens of the answer in "
                "`answer`, which also contains the prefill of the query.",
                additionalProperties={"type": "number"},
            ),
            "peak_bytes": of(
                "integer",
                "Peak resident memory of the process during these calls (elsewhere than on Linux: so far).",
                minimum=1,
            ),
        },
    ),
    "doctor": record(
        "What `doctor --json` prints.",
        {
            "machine": of("object", "Processor, memory, driver and devices; sizes in bytes."),
            "packages": of("object", "Version of each package; null: missing."),
            "onnxruntime": of("object", "Version of each installed flavour.", additionalProperties={"type": "string"}),
            "providers": of("array", "Providers that onnxruntime lists.", items={"type": "string"}),
            "tensorrt": of("object", "Version of each TensorRT package.", additionalProperties={"type": "string"}),
            "backends": list_of("backend_state", "Backends, best first."),
            "problems": list_of("missing", "Problems that do not belong to one backend."),
        },
    ),
    "backend_state": record(
        "A backend on this machine.",
        {
            "name": of("string", "Its name."),
            "version": of("string?", "Version of its package; null: not installed."),
            "missing": list_of("missing", "What is missing."),
            "ready": of("boolean", "Whether nothing is missing."),
        },
    ),
    "missing": record(
        "Something that is missing.",
        {"what": of("string", "What it is."), "command": of("string", "The command or action that adds it.")},
    ),
    "estimates": record(
        "What `estimate --json` prints.",
        {
            "schema": ORIGIN["schema"],
            "model": of("string", "The model, as given."),
            "frames": of("integer", "Coarse frames of the video.", minimum=1),
            "queries": of("integer", "Queries that run together.", minimum=1),
            "fine_frames": of("integer?", "Fine frames, as given; null: as many as coarse frames."),
            "size": ref("size", "Size of the video."),
            "estimates": list_of("estimate", "An estimate per device and precision."),
        },
    ),
    "estimate": record(
        "Memory and time of a request on a device, estimated.",
        {
            "target": of("string", "Name of the device; `cpu` is the machine that ran the command."),
            "dtype": of("string", "Precision of the language model."),
            "heads": of("string", "Heads that answer.", enum=list(HEADS)),
            "fits": of("boolean", "Whether `needed` is at most `usable`."),
            "memory": counts(
                "Bytes.",
                {
                    "weights": "Weights of all graphs.",
                    "kv_cache": "Keys and values of the video and of each query.",
                    "activations": "Tensors of the largest stage, and those that are kept between stages.",
                    "needed": "Sum of these.",
                    "usable": "Memory of the device without what its system keeps.",
                },
                "integer",
            ),
            "stages": list_of(
                "stage_estimate", "The stages of a request in their order; decoding the video is left out."
            ),
            "total_s": of("number", "Seconds of all stages.", minimum=0),
            "token_s": of("number", "Seconds per token of an answer without a grammar.", minimum=0),
            "prefix_tokens": of("integer", "Tokens of the prompt up to the query.", minimum=1),
            "efficiencies": record(
                "Shares of the device's peaks that are assumed.",
                {
                    "compute": of("number", "Of the operations per second."),
                    "memory": of("number", "Of the bandwidth."),
                    "source": of("string", "What they were fitted on."),
                },
            ),
        },
    ),
    "stage_estimate": record(
        "A stage of an estimate.",
        {
            "name": of("string", "Its name, as in `timings`."),
            "seconds": of("number", "Seconds.", minimum=0),
            "operations": of("integer", "Operations of matmuls; a multiply-add is two.", minimum=0),
            "bytes": of("integer", "Bytes moved between memory and processor.", minimum=0),
            "limited_by": of("string", "Which takes longer, the operations or the bytes.", enum=["compute", "memory"]),
        },
    ),
    "error": record(
        "The line on stdout of a command with --json or --jsonl that failed.",
        {
            "error": ref("problem", "The error."),
        },
    ),
}
"""The definitions by name."""
