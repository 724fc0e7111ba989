"""Run samples through the whole chain and collect what flows into its products, in bounded memory.

What a sample showed goes into one file when the sample is done; a killed run goes on with the next one. At the end the
samples' files become one file a tensor, which `Statistics` reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.calibration.collect.activation_recorder import Kind, RecordingSession
from bridge_stg.calibration.collect.instrument import Tap, instrument
from bridge_stg.calibration.collect.samples import CalibrationSet
from bridge_stg.calibration.collect.statistics import FILE, SCHEMA, Statistics
from bridge_stg.evaluation.run.evaluate import ask
from bridge_stg.evaluation.run.results import check_identity
from bridge_stg.evaluation.samples import Sample
from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.errors import BridgeError, QueryError, VideoError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.host.files import replacing

ROWS = 512
"""Rows a tensor that are kept in the end."""

PEAKS = 1 / 8
"""Share of them that are the rows of largest magnitude of single samples."""

IDENTITY, SHARDS, INSTRUMENTED, TENSORS = "collection.json", "samples", "graphs", "tensors"


def collect(
    bundle: Bundle,
    samples: CalibrationSet,
    *,
    folder: Path,
    seed: int = 0,
    rows: int = ROWS,
    variant: str | None = None,
    threads: int | None = None,
    lean: bool = False,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Statistics:
    """Collect statistics of the activations of a bundle's products on samples.

    Args:
        bundle: in float; its graphs run in onnxruntime on the CPU.
        samples: what flows; they are taken in their order.
        folder: where the statistics go; made if need be. A collection that was killed in it goes on, a finished one is
            returned at once.
        seed: of the choice of rows.
        rows: rows a tensor to keep.
        variant: the variant to run; None: the best that runs here. Of one that a pass made, what it was made of is run:
            passes melt products that are to be quantized.
        threads: CPU threads of each graph.
        lean: keep no second copy of weights in memory; slower.
        progress: called as progress("collect", samples done, samples).

    Raises:
        BridgeError: the folder holds a collection of something else, or no sample could be used.
        EngineError: onnxruntime is missing or refuses a graph.
    """
    variants = _traced(bundle, choose(bundle.manifest, backend="onnxruntime", variant=variant).variants)
    identity = {
        "schema": SCHEMA,
        "fingerprint": bundle.manifest.fingerprint,
        "variants": dict(variants),
        "samples": samples.digest,
        "seed": seed,
        "rows": rows,
    }
    _claim(folder, identity)
    report = progress or (lambda stage, done, total: None)
    todo, shards = samples.dataset.samples, folder / SHARDS
    if not (folder / FILE).exists():
        shards.mkdir(exist_ok=True)
        left = [place for place in range(len(todo)) if not _shard(shards, place).exists()]
        report("collect", len(todo) - len(left), len(todo))
        quota = math.ceil(2 * rows / len(todo))
        with _chain(bundle, variants, folder / INSTRUMENTED, quota, seed, threads, lean) as (grounder, recorders, taps):
            for done, place in enumerate(left, len(todo) - len(left) + 1):
                _record(grounder, recorders, samples, place, shards)
                report("collect", done, len(todo))
        _finish(folder, identity, taps, len(todo))
    for spent in (shards, folder / INSTRUMENTED):
        shutil.rmtree(spent, ignore_errors=True)
    return Statistics.load(folder, bundle.path)


def call_kind(graph: str, spec: ModelSpec) -> Kind:
    """Return what tells the kinds of calls of a graph apart, so that rare ones are not lost among the many."""
    if graph == "language_model":
        bridging = min(spec.language.bridging_ids)
        return lambda feeds: (
            "video"
            if feeds["visual_index"].any()
            else "bridging"
            if (feeds["input_ids"] >= bridging).any()
            else "answer"
        )
    if graph == "vision_encoder":
        return lambda feeds: "fine" if (feeds["frames"] == feeds["frames"][:, :1]).all() else "coarse"
    return lambda feeds: "boxes"


KINDS = {"vision_encoder": 2, "language_model": 3, "spatial_decoder": 1}


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder this collection's, or find that it is."""
    file = folder / IDENTITY
    if file.exists():
        try:
            header = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            header = {}
        check_identity(file, header if isinstance(header, dict) else {}, identity)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")


def _traced(bundle: Bundle, variants: Mapping[str, str]) -> dict[str, str]:
    """Return, of each graph, the variant that was traced, where a pass made the one that was chosen of it."""
    chosen = {name: bundle.graph(name, variant) for name, variant in variants.items()}
    return {name: str(graph.derived_from) if graph.made_by_pass else graph.variant for name, graph in chosen.items()}


@contextmanager
def _chain(
    bundle: Bundle,
    variants: Mapping[str, str],
    folder: Path,
    quota: int,
    seed: int,
    threads: int | None,
    lean: bool,
) -> Iterator[tuple[Grounder, dict[str, RecordingSession], dict[str, tuple[Tap, ...]]]]:
    """Open the chain with taps in all of its graphs."""
    spec, recorders, taps = bundle.manifest.spec, {}, {}
    with ExitStack() as stack:
        for number, name in enumerate(GRAPHS):
            graph = instrument(bundle, name, variants[name], folder / name)
            session = stack.enter_context(graph.open(threads=threads, lean=lean))
            taps[name] = graph.taps
            recorders[name] = RecordingSession(
                session,
                bundle.graph(name, variants[name]),
                graph.taps,
                number=number,
                kind=call_kind(name, spec),
                quota=math.ceil(quota / KINDS[name]),
                seed=seed,
            )
        grounder = stack.enter_context(Grounder(recorders, spec, Tokenizer.from_file(bundle.tokenizer_path)))
        yield grounder, recorders, taps


def _record(
    grounder: Grounder, recorders: Mapping[str, RecordingSession], samples: CalibrationSet, place: int, shards: Path
) -> None:
    """Run one sample and write what it showed. One that cannot be used leaves the reason."""
    sample = samples.dataset.samples[place]
    for recorder in recorders.values():
        recorder.begin(place)
    arrays: dict[str, np.ndarray] = {}
    info: dict[str, Any] = {"id": sample.id}
    try:
        info |= _answer(grounder, sample, allow_none=samples.dataset.allow_none)
    except (VideoError, QueryError) as error:
        info["skipped"] = str(error)
    else:
        info["calls"] = {name: recorder.calls for name, recorder in recorders.items()}
        for name, recorder in recorders.items():
            for stem, seen in recorder.seen.items():
                arrays[f"{name}/{stem}.absmax"], arrays[f"{name}/{stem}.peak"] = seen.absmax, seen.peak
                arrays[f"{name}/{stem}.rows"] = seen.rows()
                arrays[f"{name}/{stem}.count"] = np.array(seen.count)
    with replacing(_shard(shards, place)) as temporary:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, info=np.array(json.dumps(info, ensure_ascii=False)), **arrays)
            stream.flush()
            os.fsync(stream.fileno())


def _answer(grounder: Grounder, sample: Sample, *, allow_none: bool) -> dict[str, Any]:
    """Ask a sample. One that asks for a span alone is asked for its tube, so that the spatial decoder runs."""
    truth = sample.read_truth()
    asked = dataclasses.replace(sample, task="tube") if sample.task == "span" else sample
    result = ask(grounder, asked, truth, allow_none=allow_none)
    return {"answer": result.answer, "span": None if result.span is None else list(result.span)}


def _shard(folder: Path, place: int) -> Path:
    return folder / f"{place:06d}.npz"


def _info(shard: Path) -> dict[str, Any]:
    """Return what a sample's file says of it."""
    with np.load(shard, allow_pickle=False) as values:
        info: dict[str, Any] = json.loads(str(values["info"]))
        return info


def _finish(folder: Path, identity: Mapping[str, Any], taps: Mapping[str, tuple[Tap, ...]], count: int) -> None:
    """Turn the samples' files into one file a tensor, then write the file that says that all is there."""
    shards = [_shard(folder / SHARDS, place) for place in range(count)]
    infos = [_info(shard) for shard in shards]
    if all("skipped" in info for info in infos):
        raise BridgeError(f"none of the {count} calibration samples could be used; the first: {infos[0]['skipped']}")
    tensors: dict[str, dict[str, Any]] = {name: {} for name in taps}
    with ExitStack() as stack:
        opened = [stack.enter_context(np.load(shard, allow_pickle=False)) for shard in shards]
        for name, looked_at in taps.items():
            (folder / TENSORS / name).mkdir(parents=True, exist_ok=True)
            for tap in looked_at:
                prefix = f"{name}/{tap.stem}"
                seen = [shard for shard in opened if f"{prefix}.count" in shard]
                rows, absmax = _merged(prefix, seen, tap.k, identity["rows"])
                stem = f"{TENSORS}/{prefix}"
                np.save(folder / f"{stem}.rows.npy", rows)
                np.save(folder / f"{stem}.absmax.npy", absmax)
                total = sum(int(shard[f"{prefix}.count"]) for shard in seen)
                collected = {"rows": f"{stem}.rows.npy", "absmax": f"{stem}.absmax.npy", "seen": total}
                tensors[name] |= dict.fromkeys(tap.names, collected)
    with replacing(folder / FILE) as temporary:
        values = {**identity, "asked": infos, "tensors": tensors}
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")


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
