"""Definitions of reports: what `evaluate` and `evaluate-demo` write."""

from __future__ import annotations

from collections.abc import Mapping

from bridge_stg.evaluation.schema.kinds import (
    NUMBERS,
    NUMBERS_OR_NULL,
    TEXTS,
    Schema,
    list_of,
    map_of,
    of,
    record,
    ref,
    share,
)
from bridge_stg.evaluation.schema.results import ROW
from bridge_stg.runtime.bundle.reports import SCHEMA

BY_MODEL = "by the label of the model"

RUN = {
    "benchmark": of("string", "Name of the dataset."),
    "split": of("string?", "Split of the dataset; null: it has none."),
    "annotations": of("string", "SHA-256 of the annotations."),
}

CLIP_SCORES = {
    "clips": of("integer", "Number of clips.", minimum=0),
    **{
        name: of("number", text, minimum=0, maximum=1)
        for name, text in {
            "m_tIoU": "Mean temporal IoU.",
            "m_vIoU": "Mean vIoU.",
            "vIoU@0.3": "Share of clips with a vIoU above 0.3.",
            "vIoU@0.5": "Share of clips with a vIoU above 0.5.",
        }.items()
    },
}

EVALUATIONS: Mapping[str, Schema] = {
    "evaluation_report": record(
        "The file `report.json` of `evaluate`.",
        {
            "schema": of("integer", "Version of the format of reports.", const=SCHEMA),
            **RUN,
            "models": map_of({"type": "object"}, f"What identifies each model, {BY_MODEL}."),
            "samples": of("integer", "Samples of the run, with those whose media are missing.", minimum=0),
            "missing": of("array", "Media that were not found.", items=TEXTS),
            "missing_samples": of("integer", "Samples of these media.", minimum=0),
            "finished": map_of({"type": "integer"}, f"Finished samples, {BY_MODEL}."),
            "figures": map_of(
                {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": NUMBERS_OR_NULL}},
                f"Metrics by part of the dataset (task, or task and group), {BY_MODEL}; null: no sample counts.",
            ),
            "differences": map_of(
                {"$ref": "#/$defs/difference"}, f"Each model but the first against the first, {BY_MODEL}."
            ),
            "scores": map_of({"$ref": "#/$defs/histogram"}, f"Main scores of the samples, {BY_MODEL}."),
            "failed": map_of(
                {"type": "array", "items": {"$ref": "#/$defs/failed_sample"}}, f"Samples that failed, {BY_MODEL}."
            ),
            "seconds_median": map_of(NUMBERS_OR_NULL, f"Median seconds per sample, {BY_MODEL}; null: none finished."),
            "worst": list_of("worst_case", "Lowest scores of the first model, then the largest losses of the others."),
        },
    ),
    "difference": record(
        "Main scores of a model minus those of a reference, sample by sample.",
        {
            "reference": of("string", "Label of the reference."),
            "samples": of("integer", "Samples that both have finished.", minimum=0),
            "same": share("Share of samples with equal scores; null without samples, as are the next four."),
            **{name: of("number?", f"{name.capitalize()} difference.") for name in ("mean", "lowest", "highest")},
            "mean_absolute": of("number?", "Mean absolute difference.", minimum=0),
            "histogram": ref("histogram", "The differences."),
        },
    ),
    "histogram": record(
        "Counts of samples in bins of equal width.",
        {
            "edges": of("array", "Edges of the bins, one more than bins.", items=NUMBERS),
            "counts": of("array", "Samples per bin.", items={"type": "integer"}),
        },
    ),
    "failed_sample": record("A sample that failed.", {"id": ROW["id"], "error": of("string", "Why.")}),
    "worst_case": record(
        "A sample to look at.",
        {
            "id": ROW["id"],
            "why": of("string", "Why it is here."),
            "scores": map_of(NUMBERS_OR_NULL, f"Main score, {BY_MODEL}; null: not finished."),
        },
    ),
    "evaluation_header": record(
        "The first line of `samples/LABEL.jsonl` of `evaluate`: what must agree when the run is resumed.",
        {
            "schema": of("integer", "Version of this file's format.", const=1),
            **RUN,
            "allow_none": of("boolean", "Whether the answer may be that the target is absent."),
            "stream": of("integer?", "The video stream that was requested."),
            "model": of("object", "What identifies the model."),
        },
    ),
    "evaluation_row": record(
        "A line of `samples/LABEL.jsonl` after the first one: a sample, its answer and scores.",
        {
            "id": of("string", "Id of the sample."),
            "index": of("integer", "Place in the dataset.", minimum=0),
            "task": ROW["task"],
            "group": of("string?", "Group in the dataset, such as `declarative`; empty or null: none."),
            "query": of("string", "The query."),
            "media": of("string", "The video or image, as the dataset names it."),
            "present": of("boolean", "Whether the target is in the video."),
            "scores": map_of(NUMBERS, "Scores by name, such as `vIoU`."),
            "overlaps": of("array", "Of a track: IoU in every frame that counts.", items=NUMBERS),
            "prediction": ref("prediction", "The answer; missing where the sample failed."),
            "absent": of("number", "Probability of the answer that the target is absent.", minimum=0, maximum=1),
            "answer": of("string", "What the language model wrote."),
            "size": of("array", "Width and height of the video in pixels.", items={"type": "integer"}),
            "error": of("string", "Why the sample failed: kind of the error and message."),
            "seconds": of("number", "Seconds that the sample took.", minimum=0),
        },
        optional=("overlaps", "prediction", "absent", "answer", "size", "error"),
    ),
    "prediction": record(
        "An answer in the form in which it is scored.",
        {
            "found": of("boolean", "Whether the target was found."),
            "span": of("array", "Start and end in seconds.", items=NUMBERS, minItems=2, maxItems=2),
            "times": of("array", "Times of the boxes in seconds.", items=NUMBERS),
            "boxes": of(
                "array",
                "Left, top, right and bottom, in pixels of the annotation.",
                items={"type": "array", "items": NUMBERS},
            ),
        },
        optional=("span", "times", "boxes"),
    ),
    "demo_figures": record(
        "The file of `evaluate-demo --out`: scores on held-out clips.",
        {
            "model": of("string", "What was evaluated."),
            "seed": of("integer", "Seed of the clips."),
            **{
                name: ref("clip_scores", text)
                for name, text in {
                    "named": "Clips in which a named thing is to be found.",
                    "motion": "Clips in which the motion decides.",
                    "margin_0": "`named` without a margin around the answered span.",
                    "span_as_answered": "`named`, with spans as answered.",
                }.items()
            },
            **{
                name: of("number", text, minimum=0)
                for name, text in {
                    "absent_auroc": "AUROC of the probability that the target is absent.",
                    "absent_recognized": "Share of absent targets that are recognized.",
                    "present_found": "Share of present targets that are found.",
                    "swapped_query_vIoU": "Mean vIoU of the answers to another clip's query.",
                    "swapped_clips": "Clips of that score.",
                    "visual_tokens_ratio": "Visual tokens, relative to the whole video at the fine rate and size.",
                }.items()
            },
            "controls": map_of({"$ref": "#/$defs/clip_scores"}, "`named` with an input changed, by the change."),
        },
    ),
    "clip_scores": record("Means over clips.", CLIP_SCORES),
    "demo_text_figures": record(
        "The file of `evaluate-demo --text-bundle --out`: bridge heads and text heads on the same held-out clips.",
        {
            "seed": of("integer", "Seed of the clips."),
            "image": of("object", "Text heads on images: `images`, `mean_IoU`, `Acc@0.5`."),
            **{
                name: of("number", text, minimum=0, maximum=1)
                for name, text in {
                    "absent_auroc": "AUROC of the probability that the target is absent.",
                    "absent_recognized": "Share of absent targets that are recognized.",
                    "present_found": "Share of present targets that are found.",
                }.items()
            },
            "tubes": map_of(
                {"type": "object", "additionalProperties": {"$ref": "#/$defs/usage_scores"}},
                "Scores and cost by heads and mode, then by length of the clip.",
            ),
        },
    ),
    "usage_scores": record(
        "Means over clips, and means per query of what it took.",
        {
            **CLIP_SCORES,
            "calls": of("number", "Calls of the language model."),
            "seconds": of("number", "Seconds."),
            "tokens": of("number", "Tokens of the answer."),
            "accepted": of("number", "Drafted tokens that the model accepted."),
        },
    ),
}
"""The definitions by name."""
