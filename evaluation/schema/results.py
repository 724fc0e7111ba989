"""Definitions of results: what `infer`, `infer-many` and the server write, and the lines of errors and logs."""

from __future__ import annotations

from collections.abc import Mapping

from bridge_stg.evaluation.schema.kinds import Schema, counts, list_of, of, record, ref
from bridge_stg.runtime.bundle.spec import HEADS
from bridge_stg.runtime.chain.results import SCHEMA
from bridge_stg.runtime.chain.tasks import TASKS
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

ROW = {
    "id": of("string", "Id of the query: that of the table, else the line's number; in a folder, file and number."),
    "index": of("integer", "Place among the queries.", minimum=0),
    "video": of("string", "The video or image, as the table names it."),
    "task": RESULT["task"],
    "query": RESULT["query"],
    "first_box": of("array", "Of a track: the box in the first frame, as given.", items={"type": "number"}),
}

CODE = of("string", "Stable dotted code; see [troubleshooting](troubleshooting.md).")

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
            "code": CODE,
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
    "error": record(
        "The line on stdout of a command with --json or --jsonl that failed.",
        {
            "error": ref("problem", "The error."),
        },
    ),
    "log_line": record(
        "A line on stderr with --log-json.",
        {
            "time": of("string", "When it was written, ISO 8601 in UTC."),
            "level": of("string", "Severity.", enum=["debug", "info", "warning", "error", "critical"]),
            "logger": of("string", "Name of the logger."),
            "message": of("string", "Text; its wording may change."),
            "code": CODE,
        },
        optional=("code",),
    ),
}
"""The definitions by name."""
