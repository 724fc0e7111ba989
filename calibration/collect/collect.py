"""Run samples through the whole chain and collect statistics of the matmuls' inputs, in bounded memory.

The statistics of each sample go into one file, a shard; a killed run resumes at the next sample. At the end, the
shards become one file per tensor, which `Statistics` reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.calibration.collect.activation_recorder import ActivationRecorder, Kind
from bridge_stg.calibration.collect.instrument import Activation, instrument
from bridge_stg.calibration.collect.samples import CalibrationSet
from bridge_stg.calibration.collect.statistics import FILE, SCHEMA, Statistics
from bridge_stg.calibration.options import load_arguments
from bridge_stg.calibration.work_folder import read_json, write_json
from bridge_stg.evaluation.run.evaluate import run_task
from bridge_stg.evaluation.run.results import check_identity
from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import graphs_of
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.tokenizer import load_tokenizer
from bridge_stg.runtime.errors import BridgeError, QueryError, VideoError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.parity.golden import READ_ERRORS

ROWS = 512
"""Rows per tensor in the finished statistics."""

INT4_ROWS = 2048
"""The same for graphs with int4 weights, whose rounding needs the correlations of channels."""

PEAKS = 1 / 8
"""Share of them that are the rows of largest magnitude of single samples."""

IDENTITY, SHARDS, INSTRUMENTED, TENSORS = "collection.json", "samples", "graphs", "tensors"

KINDS = {"vision_encoder": 2, "language_model": 3, "spatial_decoder": 1}
"""Number of kinds of calls per graph, see `call_kind`."""


def collect(
    bundle: Bundle,
    samples: CalibrationSet,
    *,
    folder: Path,
    seed: int = 0,
    rows: int = ROWS,
    more_rows: Mapping[str, int] | None = None,
    variant: str | None = None,
    threads: int | None = None,
    head_options: Mapping[str, Any] | None = None,
    low_memory: bool = False,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Statistics:
    """Collect activation statistics of a bundle on samples.

    Args:
        bundle: float bundle; its graphs run in onnxruntime on the CPU.
        samples: samples to run, in their order.
        folder: folder of the statistics. A killed collection is resumed, a finished one is returned unchanged.
        seed: seed of the random row choice.
        rows: rows per tensor to keep.
        more_rows: the same for single graphs.
        variant: variant to run; None: the best available one. In place of a variant that a graph pass made, its source
            runs, since passes fuse matmuls that are to be quantized.
        threads: CPU threads of each graph.
        head_options: see `Options.head_options`.
        low_memory: whether to keep no second copy of weights in memory, which is slower.
        progress: called as progress("collect", samples done, samples).

    Raises:
        BridgeError: the folder has another collection, or all samples failed.
        EngineError: onnxruntime is missing or rejects a graph.
    """
    chosen = choose(bundle.manifest, backend="onnxruntime", variant=variant).variants
    graphs = (bundle.graph(name, chosen[name]) for name in graphs_of(bundle.manifest.spec))
    variants = {graph.name: str(graph.derived_from) if graph.made_by_pass else graph.variant for graph in graphs}
    identity = {
        "schema": SCHEMA,
        "fingerprint": bundle.manifest.fingerprint,
        "variants": variants,
        "samples": samples.digest,
        "seed": seed,
        "rows": rows,
        **({"more_rows": dict(more_rows)} if more_rows else {}),
        **(head_options or {}),
    }
    if (folder / IDENTITY).exists():
        known = read_json(folder / IDENTITY, dict)
        if known is None:
            what = f"{folder / IDENTITY}: is damaged. Delete the folder {folder}, and collect the statistics again."
            raise BridgeError("calibration.bad_statistics", what)
        check_identity(folder / IDENTITY, known, identity)
    else:
        write_json(folder / IDENTITY, identity)
    report = progress or (lambda stage, done, total: None)
    count, shards = len(samples.entries), folder / SHARDS
    if not (folder / FILE).exists():
        shards.mkdir(exist_ok=True)
        left = [place for place in range(count) if not _is_whole(_shard(shards, place))]
        report("collect", count - len(left), count)
        with ExitStack() as stack:
            recorders = {}
            for number, (name, one) in enumerate(variants.items()):
                graph = instrument(bundle, name, one, folder / INSTRUMENTED / name)
                recorders[name] = ActivationRecorder(
                    stack.enter_context(graph.open(threads=threads, low_memory=low_memory)), bundle.graph(name, one),
                    graph.activations, number=number, kind=call_kind(name, bundle.manifest.spec), seed=seed,
                    quota=math.ceil(math.ceil(2 * rows_of(identity, name) / count) / KINDS[name]),
                )  # fmt: skip
            tokenizer = load_tokenizer(bundle.tokenizer_path, bundle.manifest.spec)
            grounder = Grounder(recorders, bundle.manifest.spec, tokenizer, **load_arguments(head_options or {}))
            stack.enter_context(grounder)
            for done, place in enumerate(left, count - len(left) + 1):
                _record(grounder, recorders, samples, place, shards)
                report("collect", done, count)
            activations = {name: recorder.activations for name, recorder in recorders.items()}
        _finish(folder, identity, activations, count)
    for spent in (shards, folder / INSTRUMENTED):
        shutil.rmtree(spent, ignore_errors=True)
    return Statistics.load(folder, bundle.path)


def rows_of(identity: Mapping[str, Any], graph: str) -> int:
    """Return the number of rows per tensor of a graph in a collection."""
    return int(identity.get("more_rows", {}).get(graph, identity["rows"]))


def call_kind(graph: str, spec: ModelSpec) -> Kind:
    """Return a function that classifies a graph's calls, so that rare kinds get their share of rows."""
    if graph == "language_model":
        bridging = spec.language.vocab_size  # with text heads, no id is as large

        def kind(feeds: Mapping[str, np.ndarray]) -> str:
            if feeds["visual_index"].any():
                return "video"
            return "bridging" if (feeds["input_ids"] >= bridging).any() else "answer"

        return kind
    if graph == "vision_encoder":
        return lambda feeds: "fine" if (feeds["frames"] == feeds["frames"][:, :1]).all() else "coarse"
    return lambda feeds: "boxes"


def _record(
    grounder: Grounder, recorders: Mapping[str, ActivationRecorder], samples: CalibrationSet, place: int, shards: Path
) -> None:
    """Run one sample and write its shard; that of a failed sample has only the reason."""
    sample = samples.dataset.samples[place]
    for recorder in recorders.values():
        recorder.begin(place)
    arrays: dict[str, np.ndarray] = {}
    info: dict[str, Any] = {"id": sample.id}
    try:
        # The tube of a span is computed too, so that the spatial decoder runs.
        tube = dataclasses.replace(sample, task="tube") if sample.task == "span" else sample
        result = run_task(grounder, tube, sample.read_truth(), allow_none=samples.dataset.allow_none)
        info |= {"answer": result.answer, "span": None if result.span is None else list(result.span)}
    except (VideoError, QueryError) as error:
        info["skipped"] = str(error)
    else:
        info["calls"] = {name: recorder.calls for name, recorder in recorders.items()}
        for name, recorder in recorders.items():
            for stem, seen in recorder.seen.items():
                arrays[f"{name}/{stem}.absmax"], arrays[f"{name}/{stem}.peak"] = seen.absmax, seen.peak
                arrays[f"{name}/{stem}.rows"] = seen.rows()
                arrays[f"{name}/{stem}.count"] = np.array(seen.count)
    with replacing(_shard(shards, place)) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, info=np.array(json.dumps(info, ensure_ascii=False)), **arrays)
        stream.flush()
        os.fsync(stream.fileno())


def _shard(folder: Path, place: int) -> Path:
    return folder / f"{place:06d}.npz"


def _is_whole(shard: Path) -> bool:
    """Return whether a shard exists and is not damaged; otherwise its sample runs again."""
    try:
        with zipfile.ZipFile(shard) as archive:
            return archive.testzip() is None
    except READ_ERRORS:
        return False


def _finish(
    folder: Path, identity: Mapping[str, Any], activations: Mapping[str, tuple[Activation, ...]], count: int
) -> None:
    """Turn the shards into one file per tensor, then write the file that marks the collection as finished."""
    tensors: dict[str, dict[str, Any]] = {name: {} for name in activations}
    with ExitStack() as stack:
        opened = [stack.enter_context(np.load(_shard(folder / SHARDS, place))) for place in range(count)]
        infos = [json.loads(str(shard["info"])) for shard in opened]
        if all("skipped" in info for info in infos):
            what = f"all {count} calibration samples failed; the first error: {infos[0]['skipped']}"
            raise BridgeError("calibration.all_samples_failed", what)
        for name, observed in activations.items():
            (folder / TENSORS / name).mkdir(parents=True, exist_ok=True)
            for activation in observed:
                prefix = f"{name}/{activation.stem}"
                seen = [shard for shard in opened if f"{prefix}.count" in shard]
                rows, absmax = _merged(prefix, seen, activation.k, rows_of(identity, name))
                stem = f"{TENSORS}/{prefix}"
                np.save(folder / f"{stem}.rows.npy", rows)
                np.save(folder / f"{stem}.absmax.npy", absmax)
                total = sum(int(shard[f"{prefix}.count"]) for shard in seen)
                collected = {"rows": f"{stem}.rows.npy", "absmax": f"{stem}.absmax.npy", "seen": total}
                tensors[name] |= dict.fromkeys(activation.names, collected)
    write_json(folder / FILE, {**identity, "asked": infos, "tensors": tensors})


def _merged(
    prefix: str, shards: Sequence[Mapping[str, np.ndarray]], k: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [R, K] and the largest magnitudes [K] of a tensor over all samples that reached it."""
    if not shards:
        return np.zeros((0, k), np.float32), np.zeros(k, np.float32)
    absmax = np.max([shard[f"{prefix}.absmax"] for shard in shards], axis=0)
    peaks = np.stack([shard[f"{prefix}.peak"] for shard in shards])
    largest = np.argsort(-np.abs(peaks).max(-1), kind="stable")[: max(1, int(count * PEAKS))]
    drawn = np.concatenate([shard[f"{prefix}.rows"] for shard in shards])
    left = max(1, count - len(largest))
    even = np.arange(left) * len(drawn) // left if len(drawn) > left else np.arange(len(drawn))
    return np.concatenate([peaks[np.sort(largest)], drawn[even]]), absmax
