"""The whole chain on one backend: parity at every boundary, answers beside those of the CPU, stage times, memory."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.demo.bundle import CHECKPOINT, SAMPLE, SOURCE_TREE
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.backends.registry import BACKENDS
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.device.cuda import Cuda
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.parity.compare import Boundary, replay
from bridge_stg.runtime.parity.verify import graph_of

TEXT_CHECKPOINT = CHECKPOINT.with_name("text_checkpoint")
EAGER, CPU = "eager-torch", "onnxruntime"
NATIVE = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backends whose engines are compiled first, and their families."""
RUNS = 5


class LeftOut(Exception):
    """A step that cannot run here, with the reason."""


def chain(path: Path, backend: str, *, folder: Path, pretended: bool) -> dict[str, Any]:
    """Run a bundle's golden cases and the sample clip on a backend; return the figures.

    Args:
        path: the bundle.
        backend: name of a backend, or `EAGER`: the demo's checkpoint in eager torch, on the GPU.
        folder: folder of the answers of each step; the CPU's are compared with.
        pretended: whether the stand-ins are in place, which have engines already.

    Raises:
        LeftOut: the backend is not installed, or eager torch has no GPU or another precision.
        BridgeError: the backend cannot run the bundle.
    """
    bundle = Bundle.load(path)
    figures: dict[str, Any] = {"fingerprint": bundle.manifest.fingerprint}
    cuda = None if backend == CPU else Cuda()
    before = 0 if cuda is None else cuda("cudaMemGetInfo")
    with open_chain(bundle, backend, figures, pretended) as grounder:
        found = replay(bundle, grounder.sessions)
        figures["parity"] = parity(found)
        answers, figures["seconds"] = timed(grounder, runs=1 if pretended or backend == CPU else RUNS)
        if cuda is not None:
            figures["device_mebibytes"] = (before - cuda("cudaMemGetInfo")) >> 20
        graphs = getattr(grounder.sessions["language_model"], "graphs", None)
        if graphs is not None:
            figures["cuda_graphs"] = graphs.capture_error or len(graphs)
    figures["answer"] = {key: answers[key] for key in ("answer", "span")}
    (folder / f"answer-{path.name}-{backend}.json").write_text(json.dumps(answers))
    reference = folder / f"answer-{path.name}-{CPU}.json"
    if reference.is_file():
        figures["beside_the_cpu"] = agreement(answers, json.loads(reference.read_bytes()))
    if failed := [f"{b.name} (relative error {b.rel_l2:.1e}) {b.problem}".rstrip() for b in found if not b.passed]:
        figures["problem"] = f"{len(failed)} of {len(found)} boundaries drift: {', '.join(failed[:5])}"
    return figures


def open_chain(bundle: Bundle, backend: str, figures: dict[str, Any], pretended: bool) -> Grounder:
    """Return a bundle's chain on a backend, whose engines are compiled first; put facts about both into `figures`."""
    if backend == EAGER:
        return eager_torch(bundle, figures, pretended)
    (kind,) = (known for known in BACKENDS if known.name == backend)
    if kind.version() is None:
        raise LeftOut(f"not installed: {' or '.join(kind.distributions)}")
    figures["version"] = kind.version()
    if backend in NATIVE and not pretended:
        from bridge_stg.export.engines.build import build_engines

        entries = build_engines(bundle, ["this"], family=NATIVE[backend])
        figures["engines"] = {entry.graph: {"bytes": entry.size, "variant": entry.variant} for entry in entries}
    grounder = Grounder.load(bundle.path, backend=backend)
    figures["target"] = None if grounder.target is None else grounder.target.to_json()
    return grounder


def eager_torch(bundle: Bundle, figures: dict[str, Any], pretended: bool) -> Grounder:
    """Return the chain of the demo's checkpoint in eager torch: what every backend is compared with, on this GPU."""
    if {graph.precision for variants in bundle.manifest.graphs.values() for graph in variants.values()} != {"fp32"}:
        raise LeftOut("eager torch runs the checkpoint in fp32; see the bundle of that precision")
    try:
        import torch

        from bridge_stg.checkpoint.checkpoint import load_checkpoint
        from bridge_stg.model.torch_session import torch_grounder
    except ModuleNotFoundError as error:
        raise LeftOut(f"not installed: {error.name}") from error
    if not (torch.cuda.is_available() or pretended):
        raise LeftOut("this torch has no CUDA")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checkpoint = TEXT_CHECKPOINT if bundle.manifest.spec.heads == "text" else CHECKPOINT
    model = load_checkpoint(SOURCE_TREE / checkpoint).to("cpu" if pretended else "cuda")
    figures["version"] = describe("torch", "transformers")["packages"]
    return torch_grounder(model)


def parity(found: list[Boundary]) -> dict[str, Any]:
    """Return relative error, cosine and least IoU (of boxes) of every boundary, and the largest error by graph."""
    worst: dict[str, float] = {}
    for boundary in found:
        if boundary.dtype.startswith("float"):
            worst[graph_of(boundary)] = max(worst.get(graph_of(boundary), 0.0), boundary.rel_l2)
    boundaries = {b.name: {"rel_l2": b.rel_l2, "cosine": b.cosine, "iou": b.iou} for b in found}
    return {"worst": worst, "boundaries": boundaries}


def timed(grounder: Grounder, *, runs: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Ground the sample clip once to warm up and then `runs` times; return the answer, and median seconds by stage."""
    clip = SOURCE_TREE / SAMPLE
    query = clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
    answer = grounder.ground(clip, query).to_json()
    stages: dict[str, list[float]] = {}
    for _ in range(runs):
        for stage, seconds in grounder.ground(clip, query).timings.items():
            stages.setdefault(stage, []).append(seconds)
    return answer, {stage: round(statistics.median(seconds), 5) for stage, seconds in stages.items()}


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Compare two answers in JSON: whether their texts are equal, and the smallest IoU of boxes at the same times."""
    first, second = ({box["time_s"]: box["box"] for box in answer["tube"] or []} for answer in (ours, theirs))
    common = [(first[time], second[time]) for time in first.keys() & second.keys()]
    boxes = np.array(common, np.float64).reshape(-1, 2, 4)
    return {
        "same_answer": ours["answer"] == theirs["answer"],
        "boxes": len(common),
        "least_iou": float(box_iou(boxes[:, 0], boxes[:, 1]).min(initial=1.0)),
    }
