"""Definitions of reports: what `evaluate`, `calibrate`, `export`, `evaluate-demo` and `--log-json` write."""

from __future__ import annotations

from collections.abc import Mapping

from bridge_stg.evaluation.schema.kinds import Schema, list_of, map_of, of, record, ref
from bridge_stg.evaluation.schema.results import RESULTS, ROW
from bridge_stg.runtime.bundle.reports import SCHEMA

BY_MODEL = "by the label of the model"
NUMBERS = {"type": "number"}
NUMBERS_OR_NULL = {"type": ["number", "null"]}
TEXTS = {"type": "string"}
VERSION = of("integer", "Version of the format of reports.", const=SCHEMA)
IN_BUNDLE = {
    "schema": of("integer", "Version of the format of reports; missing in those of version 0.1.0.", const=SCHEMA),
    "sha256": of("string", "SHA-256 of the other fields."),
}
RUN = {
    "benchmark": of("string", "Name of the dataset."),
    "split": of("string?", "Split of the dataset; null: it has none."),
    "annotations": of("string", "SHA-256 of the annotations."),
}


def _pair(kind: str, text: str) -> Schema:
    """Return a value of the float bundle and of the quantized one."""
    return record(text, {"float": of(kind, "Of the float bundle."), "int8": of(kind, "Of the quantized bundle.")})


def _share(text: str) -> Schema:
    return of("number?", text, minimum=0, maximum=1)


SCORES_ON = {
    "labelled": of("boolean", "Whether annotations are the ground truth; otherwise the float bundle's own tubes are."),
    "samples": of("integer", "Number of samples.", minimum=0),
    "judged_on": of("string", "The samples that chose the recipe.", enum=["select", "calibration"]),
    "judgement": ref("calibration_scores", "Scores of the quantized bundle."),
    "float": ref("calibration_scores", "Scores of the float bundle."),
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

REPORTS: Mapping[str, Schema] = {
    "log_line": record(
        "A line on stderr with --log-json.",
        {
            "time": of("string", "When it was written, ISO 8601 in UTC."),
            "level": of("string", "Severity.", enum=["debug", "info", "warning", "error", "critical"]),
            "logger": of("string", "Name of the logger."),
            "message": of("string", "Text; its wording may change."),
            "code": RESULTS["problem"]["properties"]["code"],
        },
        optional=("code",),
    ),
    "evaluation_report": record(
        "The file `report.json` of `evaluate`.",
        {
            "schema": VERSION,
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
            "same": _share("Share of samples with equal scores; null without samples, as are the next four."),
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
    "calibration_report": record(
        "The file `reports/calibration.json` of a bundle of `calibrate`.",
        {
            **IN_BUNDLE,
            "html_sha256": of("string", "SHA-256 of `reports/calibration.html`."),
            "source": record(
                "The float bundle.",
                {
                    **RESULTS["bundle"]["properties"],
                    "precision": map_of(TEXTS, "Precision of each graph."),
                    "bytes": of("integer", "Bytes of its graphs.", minimum=0),
                },
            ),
            "recipe": record(
                "What was quantized, and how.",
                {
                    "name": of("string", "Name of the recipe that was requested."),
                    "graphs": map_of({"type": "object"}, "Quantization of each graph."),
                    "kept": map_of({"type": "array", "items": TEXTS}, "Blocks that stay in float, by graph."),
                    "method": of("string", "How ranges were chosen: a name, or `least error`."),
                    "max_drop": of("number?", "Most points that a metric may lose."),
                    "max_changed": of("number?", "Most percent of answers that may change; null: any."),
                    "minimal": of(
                        "boolean?", "Whether no block more can be quantized within the limits; null: unknown."
                    ),
                    "seed": of("integer", "Seed of the bootstrap."),
                },
            ),
            "samples": record(
                "The samples by use.",
                {
                    "calibration": ref("calibration_samples", "Whose activations were recorded."),
                    "select": ref(
                        "calibration_samples", "That chose the blocks; null: those of the calibration.", null=True
                    ),
                    "evaluate": ref("calibration_samples", "That the result was evaluated on; null: none.", null=True),
                },
            ),
            "warnings": of("array", "Sentences.", items=TEXTS),
            "machine": of("object", "Processor, cores, flags of the CPU, its self-test, system and Python."),
            "tools": map_of(TEXTS, "Version of each package."),
            "target": record(
                "What ran the graphs.",
                {name: RESULTS["engine"]["properties"][name] for name in ("backend", "version", "variants")},
            ),
            "graphs": list_of("calibrated_graph", "The graphs."),
            "stages": of("object", "Seconds by stage, `float` and `int8`, of the same number of `clips`."),
            "peak_bytes": of("object", "Peak memory, `float` and `int8`, of a subprocess; null: not measured."),
            "drift": list_of("drift", "The worst difference at each boundary, over the recorded calls."),
            "choice": ref("calibration_evaluation", "On the samples that chose the blocks."),
            "evaluation": ref("calibration_evaluation", "On the samples for evaluation; null: none.", null=True),
            "sensitivity": list_of("block_sensitivity", "The blocks, most sensitive first."),
            "trials": list_of("trial", "The trials of the search, in order."),
            "cases": list_of("calibration_case", "The worst cases."),
            "seconds": map_of(NUMBERS, "Seconds by step of the calibration."),
        },
        optional=("schema",),
    ),
    "calibration_samples": record(
        "A file of samples.",
        {
            "file": of("string", "Its name."),
            "sha256": of("string", "SHA-256 of its content."),
            "count": of("integer", "Samples.", minimum=0),
            "kinds": map_of({"type": "integer"}, "Samples by task."),
            "labelled": SCORES_ON["labelled"],
            "entries": list_of("calibration_sample", "The samples in their order."),
        },
    ),
    "calibration_sample": record(
        "A sample.",
        {
            "id": of("string", "Its id."),
            "kind": of("string", "Its task; `absent`: the target is not in the video."),
            "media": of("string", "Name of its video or image."),
            "sha256": of("string", "SHA-256 of the video or image."),
        },
    ),
    "calibrated_graph": record(
        "A graph.",
        {
            "graph": of("string", "Its name."),
            "precision": of("string", "Its precision."),
            "recipe": of("string", "Its recipe."),
            "int8": of("boolean", "Whether it is quantized."),
            "why": of("string", "Why, a sentence."),
            "forced": of("boolean", "Whether it was quantized without a gain."),
            "bytes": _pair("integer", "Bytes of its weights."),
            "seconds": {
                "anyOf": [_pair("number?", "Seconds of the recorded calls."), {"type": "null"}],
                "description": "Seconds of the recorded calls; null: not measured.",
            },
            "blocks": list_of("calibrated_block", "Its blocks."),
        },
    ),
    "calibrated_block": record(
        "A block of a graph.",
        {
            "block": of("string", "Its name."),
            "bytes": of("integer", "Bytes of its weights as stored."),
            "float_bytes": of("integer", "Bytes in fp32."),
            "kept": of("boolean", "Whether it stays in float."),
        },
    ),
    "drift": record(
        "Difference between the quantized and the float bundle at one boundary; null: no number.",
        {
            "graph": of("string", "The graph."),
            "tensor": of("string", "Its output."),
            "cosine": of("number?", "Least cosine."),
            "max_abs": of("number?", "Largest difference."),
            "rel_l2": of("number?", "Largest difference, relative to the norm."),
            "iou": of("number?", "Least IoU of boxes; null: no boxes."),
        },
    ),
    "calibration_evaluation": record("Scores of both bundles on the same samples.", SCORES_ON, optional=("judged_on",)),
    "calibration_scores": record(
        "Scores of a bundle.",
        {
            "label": of("string", "Its name in tables."),
            "samples": SCORES_ON["samples"],
            "failed": of("integer", "Samples that ended in an error; they score 0.", minimum=0),
            "labelled": SCORES_ON["labelled"],
            "metrics": map_of({"$ref": "#/$defs/interval"}, "Metrics by name, 0 to 1."),
            "drops": map_of({"$ref": "#/$defs/interval"}, "Loss against the float bundle, in points of 1/100."),
            "answer_agreement": _share("Share of samples with the float bundle's answer; null: that bundle itself."),
            "box_iou": _share("Mean IoU with the float bundle's boxes, where both have boxes."),
            "tube_iou": _share("Mean vIoU with the float bundle's tubes."),
            "seconds_median": of("number?", "Median seconds per sample."),
        },
    ),
    "interval": record(
        "A value and its 95 % bootstrap interval.",
        {name: of("number?", f"{name.capitalize()}.") for name in ("value", "low", "high")},
    ),
    "block_sensitivity": record(
        "What a block loses when it alone is quantized.",
        {
            "block": of("string", "The block."),
            "graph": of("string", "Its graph."),
            "proxy": of("number?", "Relative error of the outputs of its matmuls."),
            "drop": of("number?", "Points lost; null: not measured."),
            "changed": of("number?", "Share of tubes lost: 1 − vIoU with the float bundle's; null: not measured."),
            "kept": of("boolean", "Whether it stays in float."),
        },
    ),
    "trial": record(
        "A trial of the search.",
        {
            "kept": of("array", "Blocks in float.", items=TEXTS),
            "drop": of("number?", "Points lost."),
            "changed": of("number?", "Percent of answers that changed."),
            "within": of("boolean", "Whether both are within the limits."),
        },
    ),
    "calibration_case": record(
        "A sample that lost most.",
        {
            "id": ROW["id"],
            "why": of("string", "Why it is here."),
            "query": of("string", "The query."),
            "media": of("string", "The video or image."),
            "scores": map_of(NUMBERS_OR_NULL, "Score by label of the bundle."),
            "problem": of("string", "Why the page has no picture; empty: it has one."),
        },
        optional=("problem",),
    ),
    "export_report": record(
        "The file `reports/export.json` of a bundle of `export`.",
        {
            **IN_BUNDLE,
            "dtype": of("string", "Precision of the export."),
            "weight_bytes": of("integer", "Bytes of all weights.", minimum=0),
            "estimate": map_of(NUMBERS_OR_NULL, "Estimated bytes of memory and disk."),
            "peak_rss_bytes": of("integer?", "Peak resident memory of the export."),
            "replay_peak_rss_bytes": of("integer?", "Of the comparison with torch; null: there was none."),
            "replay_seconds": of("object?", "Seconds per graph and variant of the comparison; null: there was none."),
            "seconds": map_of(NUMBERS, "Seconds per step."),
        },
        optional=("schema",),
    ),
    "parity_report": record(
        "The file `reports/parity.json` of a bundle of `export`.",
        {
            **IN_BUNDLE,
            "reference": of("string", "What the graphs were compared with."),
            "passed": of("boolean", "Whether all boundaries are within their tolerance."),
            "tolerances": map_of({"$ref": "#/$defs/tolerance"}, "Tolerance by precision."),
            "dependence": map_of(
                NUMBERS, "Change of the reference with other inputs, relative to its norm, by tensor."
            ),
            "boundaries": list_of("boundary", "The comparisons."),
        },
        optional=("schema",),
    ),
    "tolerance": record(
        "Largest differences that pass.",
        {
            "max_abs": of("number", "Largest difference, relative to the scale of the tensor.", minimum=0),
            "rel_l2": of("number", "Largest difference, relative to the norm.", minimum=0),
            "least_iou": of("number", "Least IoU of boxes.", minimum=0, maximum=1),
        },
    ),
    "boundary": record(
        "A comparison of one tensor.",
        {
            "name": of("string", "Graph, tensor, variant and sizes."),
            "dtype": of("string", "Type of its numbers."),
            "shape": of("array", "Its shape.", items={"type": "integer"}),
            "max_abs": of("number?", "Largest difference."),
            "rel_l2": of("number?", "Difference relative to the norm."),
            "cosine": of("number?", "Cosine."),
            "scale": of("number?", "Largest magnitude of the reference."),
            "tolerance": ref("tolerance", "Its tolerance."),
            "problem": of("string", "Why it could not be compared; empty: it could."),
            "iou": of("number?", "Least IoU of a box; null: no boxes."),
            "passed": of("boolean", "Whether it is within its tolerance."),
        },
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
            "locate": of("object", "Text heads on images: `images`, `mean_IoU`, `Acc@0.5`."),
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
