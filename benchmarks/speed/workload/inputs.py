"""Record the inputs of every row from one run of the torch reference, shared by all runners.

Usage: python benchmarks/speed/workload/inputs.py CHECKPOINT FOLDER FRAMES WIDTH HEIGHT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speed.watching import Call, Watch, answer_marker
from speed.workload.clips import QUERIES, clip

# isort: split
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.host.files import replacing

STEPS = 16
"""Number of tokens to decode."""


def middle_quarter(spec: ModelSpec, encode: Any, frames: int) -> list[int]:
    """Return the ids of the answer for the middle quarter of a clip of `frames` coarse frames."""
    from bridge_stg.runtime.chain.grammar import AnswerGrammar
    from bridge_stg.runtime.chain.prompt import time_strings

    group = spec.vision.temporal_patch_size
    times = (np.arange(frames) / spec.frames.coarse_fps).reshape(-1, group).mean(1)
    count = len(times)
    first, last = count * 3 // 8, max(count * 3 // 8, count * 5 // 8 - 1)
    grammar = AnswerGrammar(encode, spec.prompt, time_strings(times, spec.prompt), allow_none=False)
    return grammar.answer_ids((first, last))


def record(checkpoint: Path, folder: Path, frames: int, size: tuple[int, int]) -> None:
    """Run the reference once, and write the inputs of each row to FOLDER/<row>.npz."""
    from bridge_stg.checkpoint.checkpoint import load_checkpoint
    from bridge_stg.model.torch_session import torch_grounder

    model = load_checkpoint(checkpoint)
    grounder, spec = torch_grounder(model), model.spec
    tokenizer = grounder.tokenizer
    path = clip(folder.parent / "clips", spec, frames, size=size)
    answer = middle_quarter(spec, tokenizer, frames)
    watch = Watch(grounder.sessions, marker=answer_marker(tokenizer.encode, spec.prompt.query), keep=True)
    watch.answer = answer
    grounder.ground(str(path), QUERIES[0], allow_none=False)
    folder.mkdir(parents=True, exist_ok=True)
    end_to_end = {"clip": np.array(str(path)), "queries": np.array(QUERIES), "answer_ids": np.array(answer, np.int64)}
    prompt = prompt_of(watch.calls)
    length = prompt["input_ids"].shape[1]
    generator = np.random.default_rng(0)
    text = generator.integers(0, min(spec.language.vocab_size, 150_000), (1, length + STEPS))
    found = {
        "vision": frames_of(watch.calls),
        "prefill": prompt,
        "prefill_text": {"input_ids": text[:, :length]},
        "decode": {"prefix_ids": text[:, :length], "step_ids": text[0, length:]},
        "bridge": {"prefix_ids": text[:, :length], "bridging_ids": np.array(spec.language.bridging_ids, np.int64)},
        "spatial": dict(next(call.feeds for call in watch.calls if call.graph == "spatial_decoder")),
        "end_to_end": end_to_end,
    }
    for name, arrays in found.items():
        with replacing(folder / f"{name}.npz") as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)


def frames_of(calls: list[Call]) -> dict[str, np.ndarray]:
    """Return the vision encoder's inputs before the first call of the language model, chunks concatenated."""
    first = next(i for i, call in enumerate(calls) if call.graph == "language_model")
    chunks = [call.feeds for call in calls[:first]]
    return {**chunks[0], "frames": np.concatenate([feeds["frames"] for feeds in chunks])}


def prompt_of(calls: list[Call]) -> dict[str, np.ndarray]:
    """Return the language model's inputs up to the first answer token, as one call without cached tokens."""
    language = [call for call in calls if call.graph == "language_model"]
    last = next(i for i, call in enumerate(language) if call.answers)
    fed = [call.feeds for call in language[: last + 1]]
    joined = {
        name: np.concatenate([feeds[name] for feeds in fed], axis=-1)
        for name in ("input_ids", "visual_index", "positions")
    }
    length = joined["input_ids"].shape[1]
    return {
        **joined,
        "visual_tokens": fed[0]["visual_tokens"],
        "cache_position": np.zeros(1, np.int64),
        "output_index": np.array([[length - 1]], np.int64),
    }


if __name__ == "__main__":
    record(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), (int(sys.argv[4]), int(sys.argv[5])))
