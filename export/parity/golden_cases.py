"""Record the torch reference of an export: golden cases of the bundle, and random-input cases of every graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from bridge_stg.export.parity.probes import PROBE_SIZES, RandomCase, feeds_of, run
from bridge_stg.export.tracing.side_by_side import side_by_side
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.backends.kv_pool import bucketed
from bridge_stg.runtime.bundle.contracts import graph_contract, graphs_of
from bridge_stg.runtime.errors import Interrupted
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions
from bridge_stg.runtime.index.read import Video
from bridge_stg.runtime.parity.compare import tolerance_of
from bridge_stg.runtime.parity.golden import Tolerance, write_case
from bridge_stg.runtime.parity.recording import Call, RecordingSession

HEIGHT, WIDTH, FRAMES, FPS = 96, 128, 12, 8.0
RECORDED_TOKENS = 4
"""Tokens of each recorded answer of text heads."""


def record_reference(
    model: BridgeSTG, golden: Path, cases: Path, names: Iterable[str], *, precision: str = "fp32"
) -> list[Path]:
    """Write the golden cases, and the random-input cases of graphs; return the golden cases' folders.

    Golden cases are a clip, two queries in one batch, and an image; with text heads also several images in one batch:
    the frames of the second step of `two-step`. All cases are computed side by side, since each alone would read a
    model on disk several times.

    Args:
        model: the reference, in eval mode.
        golden: the bundle's golden/ folder.
        cases: folder of random-input cases, where `probes.load_cases` finds them.
        names: the graphs that get random-input cases.
        precision: that of the bundle's graphs, which decides the tolerance of golden cases.
    """
    contracts = [graph_contract(name, model.spec, variant="", opset=0) for name in graphs_of(model.spec)]
    outputs = [tensor.name for contract in contracts for tensor in contract.outputs]
    tolerance = {name: value for name in outputs if (value := tolerance_of(precision, name)) is not None}
    folders, tasks = list[Path](), list[Callable[[], None]]()
    for name, (calls, note) in _golden_calls(model).items():
        folders.append(golden / name)
        tasks.append(partial(_write_golden, golden / name, calls, note, tolerance))
    cases.mkdir(parents=True, exist_ok=True)
    sizes = [(name, index) for name in names for index in range(len(PROBE_SIZES[name]))]
    tasks += [partial(_write_random, cases, name, index, model) for name, index in sizes]
    side_by_side(tasks)
    return folders


def _golden_calls(model: BridgeSTG) -> dict[str, tuple[Callable[[], list[Call]], str]]:
    """Return how the calls of each golden case are recorded, and its note."""
    image, two = next(scene())[1], ("the square", "a blue ball that moves to the left")
    cases: dict[str, tuple[Callable[[], list[Call]], str]] = {
        "clip": (lambda: record(model, scene(), ("the red square",)), "one query on a clip of a moving square"),
        "batch": (lambda: _with_masked(model, record(model, scene(), two)), "two queries of different lengths"),
        "image": (lambda: record(model, image, ("the red square",)), "one query on an image"),
    }
    if model.spec.heads != "bridge":
        cases["frames"] = (lambda: record_frames(model, "the red square"), "a query on several frames, each an image")
    return cases


def _write_golden(folder: Path, calls: Callable[[], list[Call]], note: str, tolerance: Mapping[str, Tolerance]) -> None:
    """Record the calls of a golden case, and write it."""
    recorded = calls()
    language = [feeds for graph, feeds, _ in recorded if graph == "language_model"]
    capacity = bucketed(max(int(f["cache_position"].max()) + f["input_ids"].shape[1] for f in language))
    write_case(folder, recorded, kind=folder.name, note=note, tolerance=tolerance, cache_capacity=capacity)


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


def _with_masked(model: BridgeSTG, calls: list[Call]) -> list[Call]:
    """Return the calls, and the last spatial one with rows that see different frames, whatever spans were predicted.

    Text heads have no spatial calls.
    """
    spatial = [feeds for graph, feeds, _ in calls if graph == "spatial_decoder"]
    if not spatial:
        return calls
    mask = np.ones_like(spatial[-1]["frame_mask"])
    for row in range(1, len(mask)):
        mask[row, mask.shape[1] // (row + 1) :] = mask.shape[1] == 1
    feeds = {**spatial[-1], "frame_mask": mask}
    return [*calls, ("spatial_decoder", feeds, TorchSession("spatial_decoder", model).infer(feeds))]


def random_case(name: str, index: int, model: BridgeSTG, *, seed: int = 0) -> RandomCase:
    """Return the random-input case of a graph at one of its sizes, with the outputs of a model in eval mode."""
    reference, sizes = TorchSession(name, model), PROBE_SIZES[name][index]
    feeds, past = feeds_of(name, model.spec, sizes, np.random.default_rng([seed, index]))
    expected = run(reference, feeds, past)
    dependence = {}
    if index == 1:
        others, _ = feeds_of(name, model.spec, sizes, np.random.default_rng([seed + 1, index]))
        moved = run(reference, others, past)
        for k, value in expected.items():
            norm = max(float(np.linalg.norm(value)), 1e-12)
            dependence[f"{name}.{k}"] = float(np.linalg.norm(value - moved[k]) / norm)
    return RandomCase(name, sizes, feeds, past, expected, dependence)


def random_cases(name: str, model: BridgeSTG) -> Iterator[RandomCase]:
    """Yield the random-input cases of a graph, one per size."""
    return (random_case(name, index, model) for index in range(len(PROBE_SIZES[name])))


def _write_random(folder: Path, name: str, index: int, model: BridgeSTG) -> None:
    random_case(name, index, model).save(folder / f"{name}_{index}.npz")
