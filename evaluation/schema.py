"""The JSON schema of everything that commands and the server write about results, and its tables for the documentation.

The single place where fields are defined: `bridge-stg schema` prints it, docs/results.md has its tables, the server's
OpenAPI document contains it, and the tests validate what each command writes against it. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from bridge_stg.runtime.bundle.spec import HEADS
from bridge_stg.runtime.chain.results import SCHEMA
from bridge_stg.runtime.chain.tasks import TASKS
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.live.events import KINDS
from bridge_stg.runtime.video.decoder import CLOCKS
from bridge_stg.runtime.video.token_budget import LIMITS

Schema: TypeAlias = "dict[str, Any]"

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DOCUMENTS = ("document", "line", "table_header", "table_row", "watch_line", "bench", "doctor", "estimates", "error")
"""Definitions of whole JSON documents or lines; the others are parts of them."""


def _of(kind: str, text: str, **rules: Any) -> Schema:
    """Return the schema of a JSON type; a kind that ends in `?` may be null."""
    name = kind.removesuffix("?")
    types = {"type": [name, "null"] if kind.endswith("?") else name}
    if kind.endswith("?") and "enum" in rules:
        rules["enum"] = [*rules["enum"], None]
    return {**types, "description": text, **rules}


def _ref(name: str, text: str, *, null: bool = False) -> Schema:
    """Return a reference to a definition."""
    target = {"$ref": f"#/$defs/{name}"}
    return {"anyOf": [target, {"type": "null"}], "description": text} if null else {**target, "description": text}


def _list(name: str, text: str, *, null: bool = False) -> Schema:
    """Return a list of a definition."""
    return _of("array?" if null else "array", text, items={"$ref": f"#/$defs/{name}"})


def _object(text: str, fields: Mapping[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    """Return an object; other fields than these may follow in later versions."""
    required = [name for name in fields if name not in optional]
    return {"type": "object", "description": text, "properties": dict(fields), "required": required}


def _counts(text: str, fields: Mapping[str, str], kind: str, *, optional: bool = False) -> Schema:
    """Return an object of numbers, all of them optional if `optional`."""
    described = {name: _of(kind, about, minimum=0) for name, about in fields.items()}
    return _object(text, described, optional=tuple(fields) if optional else ())


BOX_AT = {
    "time_s": _of("number", "Seconds from the first frame of the video; of a live stream, time of the stream."),
    "box": _of(
        "array", "Left, top, right and bottom in pixels of the video as displayed.", items={"type": "number"},
        minItems=4, maxItems=4,
    ),
    "presence": _of("number", "Probability that the target is in the frame; of text heads 1.", minimum=0, maximum=1),
    "visible": _of("boolean", "Whether presence is at least the model's threshold."),
}  # fmt: skip

ORIGIN = {
    "schema": _of("integer", "Version of this format.", const=SCHEMA),
    "program": _ref("program", "What computed the results."),
    "bundle": _ref("bundle", "The bundle that was run; null: the graphs are not from a bundle.", null=True),
    "engine": _ref("engine", "The backend that ran the graphs, and why; null: unknown.", null=True),
    "source": _of("string", "The video, image or stream, as given; user and password of an address are left out."),
    "options": _of("object", "The options that may change the answers, by their names in the API."),
}

RESULT = {
    "schema": _of("integer", "Version of this format.", const=SCHEMA),
    "task": _of(
        "string",
        "`tube`: when and where; `span`: only when; `image`: where, in an image that shows the target; `track`: from "
        "a box in the first frame.",
        enum=list(TASKS),
    ),
    "query": _of("string", "The query, as given; of a track without one, `the object`."),
    "unknown_words": _of(
        "array",
        "Words of the query, casefolded, that the bundle says its model does not know; empty if it does not say which "
        "it knows.",
        items={"type": "string"},
    ),
    "found": _of("boolean", "Whether the target is in the video."),
    "span": _ref(
        "span",
        "When the target is there: `named_span` after presence moved its ends; with text heads, as named. Of a track, "
        "from the start to where the target leaves; of an image, the nominal time of one frame. Null: not found.",
        null=True,
    ),
    "named_span": _ref("span", "The span that the answer names, before presence moved its ends.", null=True),
    "answer": _of(
        "string",
        "What the language model wrote, such as `<2.2 seconds> to <4.2 seconds>` or `none`; its times count from "
        "the start of the window in a search and in a live stream.",
    ),
    "heads": _of(
        "string",
        "What computed the boxes: `bridge`, the bridging queries and the spatial decoder; `text`, the language model.",
        enum=list(HEADS),
    ),
    "mode": _of(
        "string",
        "How text heads answered: `joint`, all boxes in one answer; `two-step`, the span, then a box per frame; `span` "
        "or `image`, one answer. Empty with bridge heads.",
        enum=["", "joint", "two-step", "span", "image"],
    ),
    "decoding": _ref("decoding", "Counts of a text answer; an empty object with bridge heads."),
    "size": _ref("size", "The video as displayed: upright, with square pixels. Boxes are in these pixels."),
    "coarse": _ref("coarse", "The frames that the language model got."),
    "clock": _of(
        "string",
        "Where times come from: `timestamps`, time stamps of all frames; `frame_rate`, partly the frame rate that the "
        "file states; `guessed`, partly an assumed rate, or corrected time stamps.",
        enum=list(CLOCKS),
    ),
    "stream": _of("integer?", "Index of the video stream that was read; null: the file has only one.", minimum=0),
    "scores": _ref("scores", "Probabilities of the answer."),
    "tube": _list("computed_box", "The boxes as computed, one per fine frame. Null: none, as for `span`.", null=True),
    "boxes": _list(
        "frame_box",
        "A box for every frame of the video in the span; of a track, for every frame. Null where `tube` is null.",
        null=True,
    ),
    "tokens": _ref("tokens", "Visual tokens computed for this query."),
    "timings_s": _ref("timings", "Seconds of the stages."),
}

SEARCHED = {
    "score": _of(
        "number",
        "Rank of the occurrence: (1 − `absent`) · `answer` · `presence` of its `scores`; without boxes, presence "
        "counts as 1.",
        minimum=0,
        maximum=1,
    ),
    "occurrences": _list(
        "occurrence", "All occurrences of the target, best first; the other fields are those of the best one."
    ),
    "windows": _ref("windows", "The windows of the search."),
}
"""Fields that the result of a search has too."""

EVENT = {
    "event": _of(
        "string",
        "`appeared`: a span is newer than every reported one; `moved`: the box overlaps the last reported one too "
        "little; `left`: the span ended.",
        enum=list(KINDS),
    ),
    "query": _of("string", "The standing query."),
    "time_s": _of("number", "Time of the event in the stream, in seconds."),
    "wall_time": _of(
        "string?",
        "When the frame of the event arrived, ISO 8601 in UTC; of a file that is read as fast as possible, when the "
        "newest frame of the round was read.",
    ),
    "known_s": _of("number", "Time up to which the model had seen the stream when it detected the event."),
    "box": BOX_AT["box"],
    "span": _ref("span", "The span of the answer that shows the event, in time of the stream.", null=True),
    "scores": _ref("scores", "Probabilities of this answer."),
    "tube": _list("computed_box", "The computed boxes of this answer.", null=True),
}

ROUND = {
    "known_s": _of("number", "Time up to which the model has seen the stream, in seconds."),
    "window": _ref("span", "Start and end of the window that was searched."),
    "behind_s": _of("number", "Seconds of the stream that were read after `known_s` by the end of the round."),
    "took_s": _of("number", "Seconds that the round took.", minimum=0),
    "wall_time": _of("string", "When the newest frame of the window arrived, ISO 8601 in UTC."),
    "latency_s": _of("number", "Seconds from the arrival of this frame to the answers.", minimum=0),
    "groundings": _list("result", "The answers, in the order of the queries; times are times of the stream."),
    "events": _list("event", "The new events in order of time."),
}

WATCHED = {
    **{
        name: _of("integer", text, minimum=0)
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
        name: _of("number", text, minimum=0)
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
    "ended": _of("string", "Why the watch ended.", enum=["source", "stopped", "duration", "error"]),
}

WRITTEN = _of("string", "When the line was written, ISO 8601 in UTC.")

ROW = {
    "id": _of("string", "Id of the query: that of the table, else the line's number; in a folder, file and number."),
    "index": _of("integer", "Place among the queries.", minimum=0),
    "video": _of("string", "The video or image, as the table names it."),
    "task": RESULT["task"],
    "query": RESULT["query"],
}


def _tagged(tag: str, text: str, fields: Mapping[str, Schema]) -> Schema:
    """Return a line of `watch` whose field `event` is `tag`."""
    return _object(text, {"event": _of("string", f"Always `{tag}`.", const=tag), **fields})


DEFINITIONS: Mapping[str, Schema] = {
    "document": _object(
        "What `infer --json` writes: where the results come from, and one result per query.",
        {**ORIGIN, "results": _list("result", "The results, in the order of the queries.")},
    ),
    "result": _object(
        "The answer to one query: in `infer --json`, in `infer-many`'s rows, in the server's `results`, from Triton, "
        "and from `Grounding.to_json`.",
        {**RESULT, **SEARCHED},
        optional=tuple(SEARCHED),
    ),
    "occurrence": _object(
        "One time at which the target is in a video that was searched window by window.",
        {
            "score": SEARCHED["score"],
            **{name: RESULT[name] for name in ("span", "named_span", "answer", "scores", "tube", "boxes")},
        },
    ),
    "windows": _object(
        "The windows of a search.",
        {
            "count": _of("integer", "How many there were.", minimum=1),
            "length_s": _of("number", "Seconds of a window.", minimum=0),
            "overlap_s": _of("number", "Seconds that a window has in common with the next one.", minimum=0),
            "absent": _of("integer", "Windows without the target.", minimum=0),
            "shots": _of("integer", "Shots of the video; no window crosses a cut. With `--no-cuts`, 1.", minimum=1),
        },
    ),
    "span": _object(
        "A time span in seconds from the first frame of the video, half-open: a frame at `end_s` is not part of it.",
        {"start_s": _of("number", "Start in seconds."), "end_s": _of("number", "End in seconds, not included.")},
    ),
    "size": _object(
        "Width and height in pixels.",
        {"width": _of("integer", "Width.", minimum=1), "height": _of("integer", "Height.", minimum=1)},
    ),
    "computed_box": _object("A box that the model computed, on one fine frame.", BOX_AT),
    "frame_box": _object(
        "A box on one frame of the video, interpolated between two computed ones where that is needed.",
        {**BOX_AT, "interpolated": _of("boolean", "Whether the box was not computed on this very frame.")},
    ),
    "scores": _object(
        "Probabilities, from 0 to 1. They are not calibrated.",
        {
            name: _of("number", text, minimum=0, maximum=1)
            for name, text in {
                "absent": "Probability of the answer that the target is absent, also where it was found.",
                "answer": "Probability of the answer among all that the grammar allows; with text heads, the geometric "
                "mean of the probabilities of its tokens.",
                "presence": "Mean presence over the tube; 0 if not found; with text heads 1 where boxes were listed.",
            }.items()
        },
    ),
    "coarse": _object(
        "How the video was sampled for the language model.",
        {
            "fps": _of("number", "Samples per second."),
            "size": _ref("size", "Size of the samples."),
            "groups": _of("integer", "Groups of samples, each with its own time in the prompt.", minimum=1),
            "tokens": _of("integer", "Visual tokens of all groups.", minimum=1),
            "max_visual_tokens": _of("integer?", "The maximum that was requested; null: none."),
            "limited_by": _of(
                "array",
                "The limits that made samples fewer or smaller than the model's own rate and size; empty: none did.",
                items={"enum": list(LIMITS)},
            ),
        },
    ),
    "tokens": _object(
        "Visual tokens.",
        {
            "coarse": _of("integer", "Of the coarse frames.", minimum=0),
            "fine": _of("integer", "Of the fine frames in which boxes were computed.", minimum=0),
            "dense": _of("integer", "Of the whole video at the fine rate and size.", minimum=0),
            "ratio": _of("number", "(coarse + fine) / dense.", minimum=0),
        },
    ),
    "timings": _counts(
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
    "decoding": _counts(
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
    "program": _object(
        "This program.", {"name": _of("string", "Its name.", const="bridge-stg"), "version": _of("string", "Version.")}
    ),
    "bundle": _object(
        "A bundle.",
        {
            "name": _of("string", "Name of its folder."),
            "fingerprint": _of("string", "SHA-256 over the hashes of its files: equal fingerprints, equal graphs."),
        },
    ),
    "engine": _object(
        "The backend that was chosen.",
        {
            "backend": _of("string", "Name, such as `onnxruntime`."),
            "version": _of("string", "Version of its package."),
            "device": _of("string", "The GPU, or `CPU`."),
            "variants": _of("object", "Variant of each graph.", additionalProperties={"type": "string"}),
            "reason": _of("string", "Why it was chosen."),
        },
    ),
    "line": {
        "description": "A line of `infer --jsonl`.",
        "anyOf": [{"$ref": "#/$defs/answered_line"}, {"$ref": "#/$defs/failed_line"}],
    },
    "answered_line": _object(
        "A result and what it comes from.",
        {
            "video": ORIGIN["source"],
            **{name: ORIGIN[name] for name in ("program", "bundle")},
            **RESULT,
            **SEARCHED,
        },
        optional=tuple(SEARCHED),
    ),
    "failed_line": _object(
        "A query whose source could not be read.",
        {
            "video": ORIGIN["source"],
            "query": RESULT["query"],
            "error": _ref("problem", "Why."),
        },
    ),
    "problem": _object(
        "An error.",
        {
            "code": _of("string", "Stable dotted code; see [troubleshooting](troubleshooting.md)."),
            "message": _of("string", "One paragraph; its wording may change."),
        },
    ),
    "table_header": _object(
        "The first line of `infer-many`'s JSON lines: what must agree when the run is resumed, and the program.",
        {
            "schema": _of("integer", "Version of this line's format.", const=1),
            "program": _ref("program", "What began the file."),
            "bundle": _of("string", "Name of the bundle's folder."),
            "task": RESULT["task"],
            "allow_none": _of("boolean", "Whether the answer may be that the target is absent."),
            "max_visual_tokens": _of("integer?", "See `coarse`."),
            "stream": _of("integer?", "The video stream that was requested."),
            "window": {
                "type": ["number", "string"],
                "description": "Seconds of a window, `auto` or `whole`; missing: `auto`.",
            },
            "cuts": _of("boolean", "Whether a search finds hard cuts; missing: true."),
            "top": _of("integer?", "Most occurrences per query in a video that is searched; null or missing: all."),
            "model": _of("object", "Fingerprint of the bundle, backend, variants and options of text heads."),
        },
        optional=("window", "cuts", "top"),
    ),
    "table_row": {
        "description": "A line of `infer-many` after the first one, and a row of its Parquet table.",
        "anyOf": [{"$ref": "#/$defs/answered_row"}, {"$ref": "#/$defs/failed_row"}],
    },
    "answered_row": _object("A query and its result.", {**ROW, **RESULT, **SEARCHED}, optional=tuple(SEARCHED)),
    "failed_row": _object(
        "A query that failed.", {**ROW, "error": _of("string", "Why: kind of the error and message.")}
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
            "queries": _of("array", "The standing queries.", items={"type": "string"}),
            **ORIGIN,
        },
    ),
    "event": _object("A target that appeared, moved or left. The server sends it as `event`.", EVENT),
    "round": _object("The answers to the standing queries at one time. The server sends it as `update`.", ROUND),
    "watch_answers": _tagged("answers", "A round, as a line.", ROUND),
    "watch_end": _tagged(
        "end", "The last line of a watch: its counts, and seconds in total.", {"wall_time": WRITTEN, **WATCHED}
    ),
    "bench": _object(
        "What `bench --json` writes. All seconds are wall time, and medians and 95th percentiles are over the calls.",
        {
            **ORIGIN,
            "machine": _of("object", "Processor, cores, system, Python and packages."),
            "load_average": _of(
                "array?",
                "Load of the machine at the end, over 1, 5 and 15 minutes; null: not known.",
                items={"type": "number"},
            ),
            "load_s": _of("number", "Seconds to load the bundle, with the import of the backend's package.", minimum=0),
            "first_answer_s": _of(
                "number", "Seconds from the start of loading to the first answer on the first video.", minimum=0
            ),
            "rows": _list("bench_row", "One row per video."),
        },
    ),
    "bench_row": _object(
        "The figures of one video.",
        {
            "coarse_frames": _of("integer", "Coarse frames that were encoded.", minimum=1),
            "tokens": _object(
                "Visual tokens, `coarse` and `fine`, and tokens of the `answer`.",
                {name: _of("integer", "Tokens.", minimum=0) for name in ("coarse", "fine", "answer")},
            ),
            "stages": _of(
                "object",
                "`median_s` and `p95_s` of each stage and of `total`, by the names of `timings`.",
                additionalProperties=_object(
                    "Seconds.", {name: _of("number", "Seconds.", minimum=0) for name in ("median_s", "p95_s")}
                ),
            ),
            "tokens_per_s": _of(
                "object",
                "Tokens per second: coarse visual tokens in `vision_coarse` and in `prefill`; tokens of the answer in "
                "`answer`, which also contains the prefill of the query.",
                additionalProperties={"type": "number"},
            ),
            "peak_bytes": _of(
                "integer",
                "Peak resident memory of the process during these calls (elsewhere than on Linux: so far).",
                minimum=1,
            ),
        },
    ),
    "doctor": _object(
        "What `doctor --json` prints.",
        {
            "machine": _of("object", "Processor, memory, driver and devices; sizes in bytes."),
            "packages": _of("object", "Version of each package; null: missing."),
            "onnxruntime": _of("object", "Version of each installed flavour.", additionalProperties={"type": "string"}),
            "providers": _of("array", "Providers that onnxruntime lists.", items={"type": "string"}),
            "tensorrt": _of("object", "Version of each TensorRT package.", additionalProperties={"type": "string"}),
            "backends": _list("backend_state", "Backends, best first."),
            "problems": _list("missing", "Problems that do not belong to one backend."),
        },
    ),
    "backend_state": _object(
        "A backend on this machine.",
        {
            "name": _of("string", "Its name."),
            "version": _of("string?", "Version of its package; null: not installed."),
            "missing": _list("missing", "What is missing."),
            "ready": _of("boolean", "Whether nothing is missing."),
        },
    ),
    "missing": _object(
        "Something that is missing.",
        {"what": _of("string", "What it is."), "command": _of("string", "The command or action that adds it.")},
    ),
    "estimates": _object(
        "What `estimate --json` prints.",
        {
            "schema": ORIGIN["schema"],
            "model": _of("string", "The model, as given."),
            "frames": _of("integer", "Coarse frames of the video.", minimum=1),
            "queries": _of("integer", "Queries that run together.", minimum=1),
            "fine_frames": _of("integer?", "Fine frames, as given; null: as many as coarse frames."),
            "size": _ref("size", "Size of the video."),
            "estimates": _list("estimate", "An estimate per device and precision."),
        },
    ),
    "estimate": _object(
        "Memory and time of a request on a device, estimated.",
        {
            "target": _of("string", "Name of the device; `cpu` is the machine that ran the command."),
            "dtype": _of("string", "Precision of the language model."),
            "heads": _of("string", "Heads that answer.", enum=list(HEADS)),
            "fits": _of("boolean", "Whether `needed` is at most `usable`."),
            "memory": _counts(
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
            "stages": _list(
                "stage_estimate", "The stages of a request in their order; decoding the video is left out."
            ),
            "total_s": _of("number", "Seconds of all stages.", minimum=0),
            "token_s": _of("number", "Seconds per token of an answer without a grammar.", minimum=0),
            "prefix_tokens": _of("integer", "Tokens of the prompt up to the query.", minimum=1),
            "efficiencies": _object(
                "Shares of the device's peaks that are assumed.",
                {
                    "compute": _of("number", "Of the operations per second."),
                    "memory": _of("number", "Of the bandwidth."),
                    "source": _of("string", "What they were fitted on."),
                },
            ),
        },
    ),
    "stage_estimate": _object(
        "A stage of an estimate.",
        {
            "name": _of("string", "Its name, as in `timings`."),
            "seconds": _of("number", "Seconds.", minimum=0),
            "operations": _of("integer", "Operations of matmuls; a multiply-add is two.", minimum=0),
            "bytes": _of("integer", "Bytes moved between memory and processor.", minimum=0),
            "limited_by": _of("string", "Which takes longer, the operations or the bytes.", enum=["compute", "memory"]),
        },
    ),
    "error": _object(
        "The line on stdout of a command with --json or --jsonl that failed.",
        {
            "error": _ref("problem", "The error."),
        },
    ),
}
"""All definitions by name."""


def schema(name: str = "document") -> Schema:
    """Return the JSON schema of a definition, complete with those that it refers to.

    Raises:
        BridgeError: no definition has this name.
    """
    if name not in DEFINITIONS:
        message = f"no part of the results is called {name!r}; expected one of {', '.join(DEFINITIONS)}"
        raise BridgeError("options.invalid", message)
    used = {key: DEFINITIONS[key] for key in DEFINITIONS if key in _names(name, set())}
    return {
        "$schema": DIALECT,
        "title": f"bridge-stg {name}, version {SCHEMA}",
        "$ref": f"#/$defs/{name}",
        "$defs": used,
    }


def inlined(name: str) -> Schema:
    """Return a definition with what it refers to in place, for documents that have references of their own."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            target = {} if "$ref" not in value else replaced(DEFINITIONS[value["$ref"].rpartition("/")[2]])
            return target | {key: replaced(inner) for key, inner in value.items() if key != "$ref"}
        return [replaced(inner) for inner in value] if isinstance(value, list) else value

    found: Schema = replaced(DEFINITIONS[name])
    return found


def tables() -> str:
    """Return a table of fields per definition, in Markdown."""
    return "\n\n".join(_table(name, definition) for name, definition in DEFINITIONS.items())


def _table(name: str, definition: Schema) -> str:
    lines = [f"### `{name}`", "", definition["description"]]
    if "properties" not in definition:
        return "\n".join([*lines, "", f"One of: {_type(definition)}."])
    lines += ["", "| field | type | meaning |", "|---|---|---|"]
    for field, about in definition["properties"].items():
        optional = "" if field in definition["required"] else ", optional"
        lines.append(f"| `{field}` | {_type(about)}{optional} | {about['description']} |")
    return "\n".join(lines)


def _type(about: Schema) -> str:
    """Return a field's type in words."""
    if "$ref" in about:
        name = about["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "anyOf" in about:
        return " or ".join(map(_type, about["anyOf"]))
    kinds = [about["type"]] if isinstance(about["type"], str) else about["type"]
    if kinds[0] == "array":
        items = about["items"]
        kinds = [
            f"list of {_type(items)}" if "$ref" in items else f"list of {items.get('type', 'string')}s",
            *kinds[1:],
        ]
    return " or ".join(kinds)


def _names(name: str, found: set[str]) -> set[str]:
    """Return a definition's name with those of all that it refers to, added to `found`."""
    if name not in found:
        found.add(name)
        for other in _refs(DEFINITIONS[name]):
            _names(other, found)
    return found


def _refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
        return own + [name for inner in value.values() for name in _refs(inner)]
    return [name for inner in value for name in _refs(inner)] if isinstance(value, list) else []
