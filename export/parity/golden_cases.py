"""Record the torch reference of an export: golden cases of the bundle, and random-input cases of every graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bridge_stg.export.parity.probes import PROBE_SIZES, RandomCase, feeds_of, run
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.backends.kv_pool import bucketed
from bridge_stg.runtime.bundle.contracts import graph_contract, graphs_of
from bridge_stg.runtime.chain.positions import VisualGrid, vision_tables
from bridge_stg.runtime.chain.vision_pass import merged_grid
from bridge_stg.runtime.grounder import Grounder, Video
from bridge_stg.runtime.heads.generate import generate, stock_segment
from bridge_stg.runtime.parity.compare import tolerance_of
from bridge_stg.runtime.parity.golden import write_case
from bridge_stg.runtime.parity.recording import Call, RecordingSession

HEIGHT, WIDTH, FRAMES, FPS = 96, 128, 12, 8.0
ANSWER = 4  # tokens of a recorded answer in text


def record_golden(model: BridgeSTG, folder: Path, *, precision: str = "fp32") -> list[Path]:
    """Write golden/<case> for a clip, for two queries in one batch, and for an image; return the cases' folders.

    With text heads, the cases are a question about a clip, and two about an image in one batch.

    Args:
        model: the reference, in eval mode.
        folder: the bundle's golden/ folder.
        precision: precision of the bundle's graphs, which decides the tolerance of the cases.
    """
    contracts = [graph_contract(name, model.spec, variant="", opset=0) for name in graphs_of(model.spec)]
    outputs = [tensor.name for contract in contracts for tensor in contract.outputs]
    tolerance = {name: value for name in outputs if (value := tolerance_of(precision, name)) is not None}
    recorded = record_text(model) if model.spec.heads == "text" else record_bridge(model)
    for name, (calls, note) in recorded.items():
        language = [feeds for graph, feeds, _ in calls if graph == "language_model"]
        capacity = bucketed(max(int(f["cache_position"].max()) + f["input_ids"].shape[1] for f in language))
        write_case(folder / name, calls, kind=name, note=note, tolerance=tolerance, cache_capacity=capacity)
    return [folder / name for name in recorded]


def record_bridge(model: BridgeSTG) -> dict[str, tuple[list[Call], str]]:
    """Return the calls and a note of each case of a model with bridge heads, by name."""
    image = next(scene())[1]
    cases: dict[str, tuple[Video, tuple[str, ...], str]] = {
        "clip": (scene(), ("the red square",), "one query on a clip of a moving square"),
        "batch": (scene(), ("the square", "a blue ball that moves to the left"), "two queries of different lengths"),
        "image": (image, ("the red square",), "one query on an image"),
    }
    recorded = {name: (record(model, video, queries), note) for name, (video, queries, note) in cases.items()}
    recorded["batch"][0].append(_masked(model, recorded["batch"][0]))
    return recorded


def record_text(model: BridgeSTG) -> dict[str, tuple[list[Call], str]]:
    """Return the same of a model with text heads: greedy answers of `ANSWER` tokens to stock prompts."""
    assert model.spec.text is not None
    prompt, text = model.spec.prompt, model.spec.text
    side, period = model.spec.vision.patch_size * model.spec.vision.merge_size, model.spec.vision.temporal_patch_size
    frames = np.stack([image for _, image in scene()])[:, : HEIGHT // side * side, : WIDTH // side * side]
    groups = frames[: len(frames) // period * period].reshape(-1, period, *frames.shape[1:])
    tokens = (HEIGHT // side) * (WIDTH // side)
    times = [f"{prompt.time.replace('{time}', f'{g * period / FPS:.{prompt.time_decimals}f}')}{prompt.group_open}"
             for g in range(len(groups))]  # fmt: skip
    video = prompt.visual_token * tokens
    video = "".join(f"{t}{video}{prompt.group_close}" for t in times) if prompt.prints_times else video * len(groups)
    image = text.image_head + text.image_token * tokens
    messages = ["What moves?", text.image.replace("{query}", "the red square")]
    turns = [text.image_turn.replace("{message}", message) for message in messages]
    clip = [prompt.head + video + text.video_turn.replace("{message}", messages[0])]
    still = frames[:1].repeat(period, 0)[None]
    return {
        "clip": (answer(model, groups, clip), "a question about a clip of a moving square"),
        "images": (answer(model, still, [image + turn for turn in turns]), "two prompts about an image in one batch"),
    }


def answer(model: BridgeSTG, groups: np.ndarray, prompts: Sequence[str]) -> list[Call]:
    """Return every call in torch of a batch of prompts about groups uint8 [G, P, height, width, 3] of frames."""
    assert model.tokenizer is not None
    spec, text = model.spec, model.spec.text
    assert text is not None
    calls: list[Call] = []
    vision_encoder, language_model = (RecordingSession(TorchSession(n, model), calls) for n in graphs_of(spec))
    rows, columns = merged_grid(groups, spec)
    tables = vision_tables(spec.vision, rows * spec.vision.merge_size, columns * spec.vision.merge_size)
    found = vision_encoder.infer({"frames": groups, **tables})["visual_tokens"]
    tokens = np.concatenate([np.zeros_like(found[:, :1]), found], 1)
    grid = VisualGrid(len(groups), rows, columns, spec.vision.temporal_patch_size / FPS if len(groups) > 1 else None)
    visual = [model.tokenizer.encode(token)[0] for token in (spec.prompt.visual_token, text.image_token)]
    segments = [stock_segment(spec.vision, model.tokenizer.encode(one), visual, [grid]) for one in prompts]
    generate(language_model, segments, tokens, max_new_tokens=ANSWER)
    return calls


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
    """Return every call of the chain in torch; the answer "none" is not allowed, so that the spatial pass runs."""
    assert model.tokenizer is not None
    calls: list[Call] = []
    sessions = {name: RecordingSession(TorchSession(name, model), calls) for name in graphs_of(model.spec)}
    with Grounder(sessions, model.spec, model.tokenizer) as grounder, grounder.open(video) as opened:
        opened.ground_many(list(queries), allow_none=False)
    return calls


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
