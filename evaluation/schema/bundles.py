"""Definitions of reports in bundles: what `calibrate` and `export` write."""

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
from bridge_stg.evaluation.schema.results import RESULTS, ROW
from bridge_stg.runtime.bundle.reports import SCHEMA

IN_BUNDLE = {
    "schema": of("integer", "Version of the format of reports; missing in those of version 0.1.0.", const=SCHEMA),
    "sha256": of("string", "SHA-256 of the other fields."),
}


def _pair(kind: str, text: str) -> Schema:
    """Return a value of the float bundle and of the quantized one."""
    return record(text, {"float": of(kind, "Of the float bundle."), "int8": of(kind, "Of the quantized bundle.")})


SCORES_ON = {
    "labelled": of("boolean", "Whether annotations are the ground truth; otherwise the float bundle's own tubes are."),
    "samples": of("integer", "Number of samples.", minimum=0),
    "judged_on": of("string", "The samples that chose the recipe.", enum=["select", "calibration"]),
    "judgement": ref("calibration_scores", "Scores of the quantized bundle."),
    "float": ref("calibration_scores", "Scores of the float bundle."),
}

BUNDLES: Mapping[str, Schema] = {
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
            "answer_agreement": share("Share of samples with the float bundle's answer; null: that bundle itself."),
            "box_iou": share("Mean IoU with the float bundle's boxes, where both have boxes."),
            "tube_iou": share("Mean vIoU with the float bundle's tubes."),
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
}
"""The definitions by name."""
