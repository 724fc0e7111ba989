"""Definitions of figures of machines: what `bench`, `doctor` and `estimate` write."""

from __future__ import annotations

from collections.abc import Mapping

from bridge_stg.evaluation.schema.kinds import Schema, counts, list_of, of, record, ref
from bridge_stg.evaluation.schema.results import ORIGIN
from bridge_stg.runtime.bundle.spec import HEADS

MACHINE: Mapping[str, Schema] = {
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
                    "weights": "Weights of all graphs; of engines, their plans.",
                    "kv_cache": "Keys and values of the video and of each query.",
                    "activations": "Tensors of the largest stage.",
                    "kept": "Visual tokens and feature maps, kept between stages.",
                    "process": "The process without a model; 0 on a CPU, where the other counts contain it.",
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
}
"""The definitions by name."""
