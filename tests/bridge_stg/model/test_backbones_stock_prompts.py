"""Both families against transformers' own `forward` and `generate`, on models that `save_pretrained` wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.chain.prompt import Segment
from bridge_stg.runtime.heads.generate import generate
from tests.bridge_stg.model.stock_models import (
    FAMILIES,
    StockPrompt,
    our_model,
    picture,
    stock_inputs,
    stock_model,
    visual_rows,
)


class Pair:
    """transformers' model and ours, with the same weights."""

    def __init__(self, family: str, folder: Any) -> None:
        self.theirs = stock_model(family)
        self.theirs.save_pretrained(folder)
        self.ours = our_model(folder)
        self.side = self.ours.spec.vision.patch_size * self.ours.spec.vision.merge_size

    def prompt(self, name: str, seed: int = 0) -> StockPrompt:
        def image(n: int, rows: int, columns: int) -> Any:
            return picture(seed + n, rows, columns, side=self.side)

        def video(n: int, rows: int, columns: int, frames: int) -> Any:
            return picture(seed + n, rows, columns, side=self.side, frames=frames)

        parts = {
            "text": [[3, 4, 5, 6, 7, 8, 9]],
            "one image": [[3, 4], image(1, 3, 5), [5, 6, 7]],
            "two images": [[3], image(2, 2, 4), [4, 5], image(3, 5, 1), [6, 7, 8]],
            "short video": [[3, 4, 5], video(4, 2, 3, 2), [6, 7]],
            "long wide video": [[3], video(5, 1, 6, 9), [6, 7, 8, 9]],
            "tall video": [[3], video(6, 5, 2, 6), [6, 7]],
            "large video": [[3, 9], video(7, 4, 5, 3), [6]],
            "image and video": [[3, 4], image(8, 2, 2), [5], video(9, 3, 3, 4), [6, 7]],
        }[name]
        return StockPrompt(self.ours, parts)  # type: ignore[arg-type]


PROMPTS = ("text", "one image", "two images", "short video", "long wide video", "tall video", "large video",
           "image and video")  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def our_logits(model: BridgeSTG, prompt: StockPrompt, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [L, vocab] and taps [T, L, H] of a whole prompt, prefilled in chunks."""
    session = TorchSession("language_model", model)
    tokens, (segment,) = visual_rows([prompt])
    cache = session.allocate_cache(batch=1, capacity=len(segment) + 3)
    logits, taps = [], []
    for start in range(0, len(segment), chunk):
        stop = min(start + chunk, len(segment))
        feeds = {
            "input_ids": segment.input_ids[None, start:stop], "visual_index": segment.visual_index[None, start:stop],
            "visual_tokens": tokens, "positions": segment.positions[:, None, start:stop],
            "cache_position": np.array([start]), "output_index": np.arange(stop - start)[None],
        }  # fmt: skip
        outputs = session.infer(feeds, cache=cache)
        logits.append(outputs["logits"][0])
        taps.append(outputs["taps"][:, 0])
    return np.concatenate(logits), np.concatenate(taps, 1)


def close(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """The weights are large, so that outputs follow inputs; they amplify rounding as well."""
    scale = float(theirs.abs().max())
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_taps_equal_transformers(pair: Pair, name: str, chunk: int) -> None:
    prompt = pair.prompt(name)
    logits, taps = our_logits(pair.ours, prompt, chunk)
    with torch.no_grad():
        theirs = pair.theirs(**stock_inputs([prompt]), output_hidden_states=True)
    close(logits, theirs.logits[0])
    # transformers reports a layer before deepstack's rows are added to it, and ours after: they agree where text is.
    text = prompt.segment().visual_index == 0
    first = theirs.hidden_states[1][0]
    close(taps[0][text], (first / first.pow(2).mean(-1, keepdim=True).sqrt())[text])


def test_logits_depend_on_the_picture(pair: Pair) -> None:
    for name in PROMPTS[1:]:
        first, other = (our_logits(pair.ours, pair.prompt(name, seed), 1000)[0][-1] for seed in (0, 100))
        assert np.abs(first - other).max() > 0.1, name


@pytest.mark.parametrize("name", PROMPTS)
def test_positions_equal_transformers(pair: Pair, name: str) -> None:
    prompt = pair.prompt(name)
    segment = prompt.segment()
    inputs = stock_inputs([prompt])
    if "mm_token_type_ids" not in inputs:  # transformers counts text up by itself
        np.testing.assert_array_equal(segment.positions, np.tile(np.arange(len(segment)), (3, 1)))
        return
    theirs, delta = pair.theirs.model.get_rope_index(**inputs)
    np.testing.assert_array_equal(segment.positions, theirs[:, 0].numpy())
    assert segment.next_position == len(segment) + int(delta)


def theirs_generated(pair: Pair, prompts: list[StockPrompt]) -> list[list[int]]:
    inputs = stock_inputs(prompts)
    with torch.no_grad():
        ids = pair.theirs.generate(**inputs, max_new_tokens=50, do_sample=False, use_cache=True)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def ours_generated(pair: Pair, prompts: list[StockPrompt], chunk: int) -> list[list[int]]:
    session = TorchSession("language_model", pair.ours)
    tokens, segments = visual_rows(prompts)
    return generate(session, segments, tokens, max_new_tokens=50, chunk=chunk)


@pytest.mark.parametrize("name", ["text", "two images", "long wide video", "image and video"])
def test_fifty_generated_ids_are_identical(pair: Pair, name: str) -> None:
    prompts = [pair.prompt(name)]
    theirs = theirs_generated(pair, prompts)
    assert len(theirs[0]) == 50 and len(set(theirs[0])) > 5
    assert ours_generated(pair, prompts, 1000) == theirs
    assert ours_generated(pair, prompts, 7) == theirs


@pytest.mark.parametrize("chunk", [1000, 7])
def test_a_batch_of_different_lengths(pair: Pair, chunk: int) -> None:
    prompts = [pair.prompt("one image"), pair.prompt("tall video")]
    assert len(prompts[0].ids) != len(prompts[1].ids)
    together = ours_generated(pair, prompts, chunk)
    assert together == theirs_generated(pair, prompts)
    assert together == [ours_generated(pair, [prompt], chunk)[0] for prompt in prompts]


def test_a_row_ends_at_a_stop_id(pair: Pair) -> None:
    prompts = [pair.prompt("text"), pair.prompt("one image")]
    tokens, segments = visual_rows(prompts)
    session = TorchSession("language_model", pair.ours)
    free = generate(session, segments, tokens, max_new_tokens=12)
    stop = free[0][4]
    ended = generate(session, segments, tokens, max_new_tokens=12, stop_ids=[stop])
    for before, after in zip(free, ended):
        expected = before[: before.index(stop) + 1] if stop in before else before
        assert after == expected


def test_feature_maps_equal_transformers(pair: Pair) -> None:
    prompt = pair.prompt("large video")
    vision = pair.ours.spec.vision
    frames = prompt.parts[1].frames  # type: ignore[union-attr]
    frames = np.concatenate([frames, frames[-1:]]).reshape(2, 2, *frames.shape[1:])
    from bridge_stg.runtime.chain.positions import merge_order, vision_tables

    rows, columns = frames.shape[2] // vision.patch_size, frames.shape[3] // vision.patch_size
    ours = TorchSession("vision_encoder", pair.ours).infer({"frames": frames, **vision_tables(vision, rows, columns)})
    inputs = stock_inputs([prompt])
    with torch.no_grad():
        theirs = pair.theirs.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    close(ours["visual_tokens"][0], theirs.pooler_output)
    last = theirs.last_hidden_state
    if vision.window_patches:  # transformers leaves the patches in its windows' order
        from transformers.vision_utils import get_vision_window_index

        order, _ = get_vision_window_index(inputs["video_grid_thw"], 2, 56, 14)
        last = last.reshape(len(order), 4, -1)[torch.argsort(order)].flatten(0, 1)
    raster = torch.empty(2, rows * columns, last.shape[-1])
    raster[:, torch.from_numpy(merge_order(rows, columns, 2))] = last.reshape(2, rows * columns, -1)
    raster = raster / raster.pow(2).mean(-1, keepdim=True).sqrt()
    close(ours["feature_map"], raster.reshape(2, rows, columns, -1))


def test_segments_are_the_grounding_prompts_own(pair: Pair) -> None:
    """A group of a grounding prompt is one vision segment behind its time: Qwen3-VL's stock prompt is made of those."""
    prompt = pair.prompt("tall video")
    segment: Segment = prompt.segment()
    if pair.ours.spec.vision.tokens_per_second is None:
        assert len(np.unique(segment.positions[0][segment.visual_index > 0])) == 3
    else:  # 1.5 steps a group, cut
        times = np.unique(segment.positions[0][segment.visual_index > 0])
        assert list(times - times[0]) == [0, 1, 3]
