"""Time prefill and vision encoder with different chunk sizes, with tiled and untiled attention.

The settings run in turn; the fastest of `--runs` counts, and outputs are compared with those of the last setting.
Frames and ids are random, since the time does not depend on them. Results go to benchmarks/results/chunks.json.

Usage: python benchmarks/chain/chunks.py --model NAME BUNDLE [--model …] [--tokens 1498] [--groups 16] [--size 384 224]
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.chain.decode import prefill_video
from bridge_stg.runtime.chain.prompt import text_segment
from bridge_stg.runtime.chain.vision_pass import coarse_tokens
from bridge_stg.runtime.host.machine import describe

TOKENS, PATCHES = (64, 128, 256, 512, 1024), (384, 768, 1024, 2048, 8192)
SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
ATTENTION = {"tiles": "0", "whole rows": "1"}


def loaded(bundle: Path, attention: str, threads: int) -> Grounder:
    """Load a bundle with tiled or untiled attention."""
    os.environ[SWITCH] = ATTENTION[attention]
    try:
        return Grounder.load(bundle, threads=threads)
    finally:
        del os.environ[SWITCH]


def quiet(*_: Any) -> None:
    """Ignore a progress report."""


def prefilled(grounder: Grounder, length: int) -> Callable[[int], np.ndarray]:
    """Return a function of the chunk size that prefills `length` text tokens and returns the last layer's values."""
    session: Any = grounder.sessions["language_model"]
    spec = grounder.spec
    ids = np.random.default_rng(0).integers(0, min(300, spec.language.vocab_size), length)
    segment = text_segment(ids, 0)
    cache = session.allocate_cache(batch=1, capacity=-(-length // 256) * 256)
    nothing = np.zeros((1 + spec.vision.deepstack_levels, 2, spec.language.hidden_size), np.float32)

    def run(size: int) -> np.ndarray:
        session.preferences = dataclasses.replace(session.preferences, prefill_chunk=size)
        prefill_video(session, cache, segment, nothing, report=quiet)
        return next(reversed(cache.buffers.values()))[:, :, :length]

    return run


def encoded(grounder: Grounder, groups: int, width: int, height: int) -> Callable[[int], np.ndarray]:
    """Return a function of the patches per call that encodes `groups` frame groups."""
    session: Any = grounder.sessions["vision_encoder"]
    spec = grounder.spec
    shape = (groups, spec.vision.temporal_patch_size, height, width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def run(size: int) -> np.ndarray:
        session.preferences = dataclasses.replace(session.preferences, encoder_patches=size)
        return np.asarray(coarse_tokens(session, spec, frames, report=quiet))

    return run


def in_turns(runs: dict[str, Callable[[int], np.ndarray]], sizes: tuple[int, ...], repeat: int) -> dict[str, Any]:
    """Return the fastest time of every setting and size, and the largest relative difference to the last output."""
    seconds: dict[str, dict[str, float]] = {name: {} for name in runs}
    made: dict[tuple[str, int], np.ndarray] = {}
    for _ in range(repeat):
        for name, run in runs.items():
            for size in sizes:
                began = time.perf_counter()
                made[name, size] = run(size)
                taken = round(time.perf_counter() - began, 4)
                made[name, size] = made[name, size].copy()
                seconds[name][str(size)] = min(taken, seconds[name].get(str(size), taken))
    expected = next(reversed(made.values()))
    worst = max(float(np.linalg.norm(one - expected) / np.linalg.norm(expected)) for one in made.values())
    return {"seconds": seconds, "largest_relative_difference": worst}


@click.command()
@click.option("--model", "models", type=(str, Path), multiple=True, required=True, help="NAME BUNDLE")
@click.option("--tokens", default=1498, show_default=True, help="Tokens of the prompt.")
@click.option("--groups", default=16, show_default=True, help="Groups of coarse frames.")
@click.option("--size", type=(int, int), default=(384, 224), show_default=True, help="Width and height of a frame.")
@click.option("--runs", default=4, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/chunks.json"))
def main(
    models: tuple[tuple[str, Path], ...],
    tokens: int,
    groups: int,
    size: tuple[int, int],
    runs: int,
    threads: int,
    out: Path,
) -> None:
    """Measure every model, and write the results."""
    found: dict[str, Any] = {}
    for name, bundle in models:
        grounders = {attention: loaded(bundle, attention, threads) for attention in ATTENTION}
        prefills = {attention: prefilled(grounder, tokens) for attention, grounder in grounders.items()}
        encoders = {"flash": encoded(grounders["whole rows"], groups, *size)}
        found[name] = {
            "prefill_by_tokens": in_turns(prefills, TOKENS, runs),
            "vision_by_patches": in_turns(encoders, PATCHES, runs),
        }
        for grounder in grounders.values():
            grounder.close()
        click.echo(f"{name}: {json.dumps(found[name])}")
    settings = {"tokens": tokens, "groups": groups, "size": list(size), "runs": runs, "threads": threads}
    result = {**settings, "models": found, "machine": describe("onnxruntime", "numpy")}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
