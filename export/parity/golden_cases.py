"""Record the torch reference of an export: golden cases of the bundle, and random-input cases of every graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bridge_stg.export.parity.probes import PROBE_SIZES, RandomCase, feeds_of, run
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.backends.kv_pool import bucketed
from bridge_stg.runtime.bundle.contracts import graph_contract, graphs_of
from bridge_stg.runtime.errors import Interrupted
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions
from bridge_stg.runtime.index.read import Video
from bridge_stg.runtime.parity.compare import tolerance_of
from bridge_stg.runtime.parity.golden import write_case
from bridge_stg.runtime.parity.recording import Call, RecordingSession

HEIGHT, WIDTH, FRAMES, FPS = 96, 128, 12, 8.0
RECORDED_TOKENS = 4
"""Tokens of each recorded answer of text heads."""


def record_golden(model: BridgeSTG, folder: Path, *, precision: str = "fp32") -> list[Path]:
    """Write golden/<case> for a clip, for two queries in one batch, and for an image; return the cases' folders.

    With text heads there is a case of several images in one batch, too: the frames of the second step of `two-step`.
    `folder` is the bundle's golden/ folder; `precision`, that of the bundle's graphs, decides their tolerance.
    """
    contracts = [graph_contract(name, model.spec, variant="", opset=0) for name in graphs_of(model.spec)]
    outputs = [tensor.name for contract in contracts for tensor in contract.outputs]
    tolerance = {name: value for name in outputs if (value := tolerance_of(precision, name)) is not None}
    image = next(scene())[1]
    cases: dict[str, tuple[Video, tuple[str, ...], str]] = {
        "clip": (scene(), ("the red square",), "one query on a clip of a moving square"),
        "batch": (scene(), ("the square", "a blue ball that moves to the left"), "two queries of different lengths"),
        "image": (image, ("the red square",), "one query on an image"),
    }
    recorded = {name: (record(model, video, queries), note) for name, (video, queries, note) in cases.items()}
    if model.spec.heads == "bridge":
        calls, _ = recorded["batch"]
        calls.append(_masked(model, calls))
    else:
        recorded["frames"] = record_frames(model, "the red square"), "a query on several frames, each an image"
    for name, (calls, note) in recorded.items():
        language = [feeds for graph, feeds, _ in calls if graph == "language_model"]
        capacity = bucketed(max(int(f["cache_position"].max()) + f["input_ids"].shape[1] for f in language))
        write_case(folder / name, calls, kind=name, note=note, tolerance=tolerance, cache_capacity=capacity)
    return [folder / name for name in recorded]


def scene() -> Iterator[tuple[float, np.ndarray]]:
    """Yield (seconds, RGB image) of a red square that crosses a shaded background."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    ground = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) % 256], -1).astype(np.uint8)
    for index in range(FRAMES):
        frame = ground.copy()
        left = 8 + index * 7
        frame[30:54, left : left + 24] = (220, 30, 30)
        yield index / FPS, frame


def record(model: BridgeSTG, video: Video, queries: tuple[str, ...]) -> list[Call]:
    """Return every call of the chain in torch; the answer "none" is not allowed, so that the spatial pass runs.

    A model with text heads answers the queries one by one as questions, in `RECORDED_TOKENS`: a tube takes many calls,
    each with the logits of the whole vocabulary.
    """
    calls: list[Call] = []
    with _recording(model, calls) as grounder, grounder.open(video) as opened:
        if grounder.heads == "text":
            for query in queries:
                "".join(opened.ask(query, max_tokens=RECORDED_TOKENS))
        else:
            opened.ground_many(list(queries), allow_none=False)
    return calls


def record_frames(model: BridgeSTG, query: str) -> list[Call]:
    """Return the calls in torch in which text heads encode frames of a span, and begin to write a box in each.

    The frames are prompts of one batch. Recording stops after `RECORDED_TOKENS` calls of the language model on them.
    """
    calls: list[Call] = []

    def first() -> int:
        """Return the index of the first call on these frames: the encoder runs again, after the span was named."""
        graphs = [graph for graph, *_ in calls]
        span = graphs.index("language_model") if "language_model" in graphs else len(graphs)
        return next((i for i, graph in enumerate(graphs) if i > span and graph == "vision_encoder"), len(graphs))

    def enough() -> bool:
        return sum(graph == "language_model" for graph, *_ in calls[first() :]) >= RECORDED_TOKENS

    with _recording(model, calls, TextOptions(mode="two-step")) as grounder, contextlib.suppress(Interrupted):
        grounder.ground(scene(), query, allow_none=False, cancel=enough)
    return calls[first() :]


def _recording(model: BridgeSTG, calls: list[Call], text: TextOptions | None = None) -> Grounder:
    """Return a grounder in torch that appends its calls to `calls`."""
    assert model.tokenizer is not None
    sessions = {name: RecordingSession(TorchSession(name, model), calls) for name in graphs_of(model.spec)}
    return Grounder(sessions, model.spec, model.tokenizer, text=text)


def _masked(model: BridgeSTG, calls: list[Call]) -> Call:
    """Return the last spatial call with rows that see different frames, whatever spans the model predicted."""
    _, feeds, _ = next(call for call in reversed(calls) if call[0] == "spatial_decoder")
    mask = np.ones_like(feeds["frame_mask"])
    for row in range(1, len(mask)):
        mask[row, mask.shape[1] // (row + 1) :] = mask.shape[1] == 1
    feeds = {**feeds, "frame_mask": mask}
    return "spatial_decoder", feeds, TorchSession("spatial_decoder", model).infer(feeds)


def random_cases(name: str, model: BridgeSTG, *, seed: int = 0) -> Iterator[RandomCase]:
    """Yield one random-input case of a graph per size, with the outputs of a model in eval mode."""
    reference = TorchSession(name, model)
    for index, sizes in enumerate(PROBE_SIZES[name]):
        feeds, past = feeds_of(name, model.spec, sizes, np.random.default_rng([seed, index]))
        expected = run(reference, feeds, past)
        dependence = {}
        if index == 1:
            others, _ = feeds_of(name, model.spec, sizes, np.random.default_rng([seed + 1, index]))
            moved = run(reference, others, past)
            for k, value in expected.items():
                norm = max(float(np.linalg.norm(value)), 1e-12)
                dependence[f"{name}.{k}"] = float(np.linalg.norm(value - moved[k]) / norm)
        yield RandomCase(name, sizes, feeds, past, expected, dependence)


def record_random_cases(name: str, model: BridgeSTG, folder: Path) -> None:
    """Write the random-input cases of one graph where `probes.load_cases` finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, case in enumerate(random_cases(name, model)):
        case.save(folder / f"{name}_{index}.npz")
