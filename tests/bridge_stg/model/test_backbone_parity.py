"""The eager graphs against transformers' own Qwen3-VL forward, on random weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from bridge_stg.checkpoint.checkpoint import checkpoint_key
from bridge_stg.demo.tiny_model import demo_config
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.chain.prompt import Tokenizer, query_segment, video_segment


@pytest.fixture(scope="module")
def reference(tiny_model: BridgeSTG) -> Qwen3VLForConditionalGeneration:
    model = Qwen3VLForConditionalGeneration(tiny_model.config.backbone_config()).eval()
    state = {checkpoint_key(k): v for k, v in tiny_model.state_dict().items()}
    state = {k: v for k, v in state.items() if not k.startswith(("bridging", "spatial"))}
    model.load_state_dict(state, strict=True)
    return model


def pixels(frames: torch.Tensor) -> torch.Tensor:
    """Patchify uint8 [G, P, H, W, 3] as transformers' video processor lays patches out."""
    groups, period, height, width, _ = frames.shape
    x = (frames.float() / 127.5 - 1).reshape(groups, period, height // 32, 2, 16, width // 32, 2, 16, 3)
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(groups * (height // 16) * (width // 16), -1)


def frames_of(groups: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(groups * height + width)
    return torch.randint(0, 256, (groups, 2, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("groups, height, width", [(1, 32, 64), (3, 64, 64), (2, 96, 32)])
def test_vision_equals_transformers(tiny_model, reference, groups, height, width):
    frames = frames_of(groups, height, width)
    tables = vision_tables(tiny_model.spec.vision, height // 16, width // 16)
    ours = TorchSession("vision_encoder", tiny_model).infer({"frames": frames.numpy(), **tables})
    with torch.no_grad():
        theirs = reference.model.visual(pixels(frames), grid_thw=torch.tensor([[groups, height // 16, width // 16]]))
    np.testing.assert_allclose(ours["visual_tokens"][0], theirs.pooler_output.numpy(), atol=2e-6)
    np.testing.assert_allclose(ours["visual_tokens"][1], theirs.deepstack_features[0].numpy(), atol=2e-6)
    raster = theirs.last_hidden_state.reshape(groups, height // 32, width // 32, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
    raster = raster.reshape(groups, height // 16, width // 16, -1)
    normalized = raster / raster.pow(2).mean(-1, keepdim=True).sqrt()
    np.testing.assert_allclose(ours["feature_map"], normalized.numpy(), atol=1e-4)


def test_unsorted_deepstack_levels_are_those_of_transformers():
    """transformers takes levels in the order of the blocks, each with the merger at its place in the list."""
    config = demo_config()
    vision = {**config.backbone["vision_config"], "deepstack_visual_indexes": [2, 0, 1]}
    torch.manual_seed(0)
    model = BridgeSTG(replace(config, backbone={**config.backbone, "vision_config": vision}))
    theirs = Qwen3VLForConditionalGeneration(model.config.backbone_config()).eval()
    theirs.model.visual.load_state_dict(model.vision_encoder.model.state_dict())
    frames = frames_of(1, 64, 64)
    feeds = {"frames": frames.numpy(), **vision_tables(model.spec.vision, 4, 4)}
    ours = TorchSession("vision_encoder", model).infer(feeds)["visual_tokens"][1:]
    with torch.no_grad():
        levels = theirs.model.visual(pixels(frames), grid_thw=torch.tensor([[1, 4, 4]])).deepstack_features
    assert len(ours) == len(levels) == 3
    for mine, level in zip(ours, levels, strict=True):
        np.testing.assert_allclose(mine, level.numpy(), atol=1e-5)


def test_position_tables_equal_transformers(tiny_model):
    for rows, columns in ((2, 2), (4, 6), (10, 4)):
        index, weight = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, rows, columns]]), num_grid_per_side=4, align_corners=True, spatial_merge_size=2
        )
        tables = vision_tables(tiny_model.spec.vision, rows, columns)
        dense = np.zeros((rows * columns, 16))
        ours = dense.copy()
        np.add.at(dense, (np.arange(rows * columns)[:, None], index.numpy()), weight.numpy())
        np.add.at(ours, (np.arange(rows * columns)[:, None], tables["pos_index"]), tables["pos_weight"])
        np.testing.assert_allclose(ours, dense, atol=1e-6)


class Prompt:
    """A video prompt in the contract's arrays, and as transformers takes it."""

    def __init__(self, model: BridgeSTG, groups: int, query: str) -> None:
        height, width = 64, 96
        self.frames, self.grid = frames_of(groups, height, width), (height // 16, width // 16)
        spec, tokenizer = model.spec, model.tokenizer
        assert isinstance(tokenizer, Tokenizer)
        self.video = video_segment(tokenizer, spec, [0.25 + i for i in range(groups)], (2, 3))
        self.query = query_segment(tokenizer, spec, query, self.video.next_position)
        tables = vision_tables(spec.vision, *self.grid)
        tokens = TorchSession("vision_encoder", model).infer({"frames": self.frames.numpy(), **tables})["visual_tokens"]
        self.tokens = np.concatenate([np.zeros_like(tokens[:, :1]), tokens], 1)
        self.ids = np.concatenate([self.video.input_ids, self.query.input_ids])
        self.index = np.concatenate([self.video.visual_index, self.query.visual_index])
        self.positions = np.concatenate([self.video.positions, self.query.positions], 1)

    def feeds(self, start: int, stop: int, *, ask: list[int]) -> dict[str, np.ndarray]:
        return {
            "input_ids": self.ids[None, start:stop], "visual_index": self.index[None, start:stop],
            "visual_tokens": self.tokens, "positions": self.positions[:, None, start:stop],
            "cache_position": np.array([start]), "output_index": np.array([ask]),
        }  # fmt: skip

    def theirs(self, model: BridgeSTG, reference: Qwen3VLForConditionalGeneration):
        ids = torch.from_numpy(self.ids)[None]
        kinds = (ids == model.config.backbone["video_token_id"]).int() * 2
        with torch.no_grad():
            return reference(
                input_ids=ids, pixel_values_videos=pixels(self.frames), mm_token_type_ids=kinds,
                video_grid_thw=torch.tensor([[len(self.frames), *self.grid]]), output_hidden_states=True,
            )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("chunk", [1000, 7])
def test_logits_and_taps_equal_transformers(tiny_model, reference, groups, chunk):
    prompt = Prompt(tiny_model, groups, "the red car moving left")
    session = TorchSession("language_model", tiny_model)
    cache = session.allocate_cache(batch=1, capacity=128)
    length = len(prompt.ids)
    logits, taps = [], []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        out = session.infer(prompt.feeds(start, stop, ask=list(range(stop - start))), cache=cache)
        logits.append(out["logits"])
        taps.append(out["taps"])
    theirs = prompt.theirs(tiny_model, reference)
    np.testing.assert_allclose(np.concatenate(logits, 1), theirs.logits.numpy(), atol=2e-4)
    first = theirs.hidden_states[1]  # after layer 0, before the deepstack rows that follow it
    text = prompt.index == 0
    normalized = (first / first.pow(2).mean(-1, keepdim=True).sqrt()).numpy()
    np.testing.assert_allclose(np.concatenate(taps, 2)[0][:, text], normalized[:, text], atol=2e-4)


def test_positions_equal_transformers(tiny_model, reference):
    prompt = Prompt(tiny_model, 3, "the dog")
    ids = torch.from_numpy(prompt.ids)[None]
    kinds = (ids == tiny_model.config.backbone["video_token_id"]).int() * 2
    theirs, _ = reference.model.get_rope_index(ids, kinds, video_grid_thw=torch.tensor([[3, *prompt.grid]]))
    np.testing.assert_array_equal(prompt.positions, theirs[:, 0].numpy())


def test_moving_cache_position_back_drops_a_query(tiny_model):
    prompt = Prompt(tiny_model, 2, "the cat")
    session = TorchSession("language_model", tiny_model)
    cache = session.allocate_cache(batch=1, capacity=128)
    video, length = len(prompt.video), len(prompt.ids)
    session.infer(prompt.feeds(0, video, ask=[0]), cache=cache)
    first = session.infer(prompt.feeds(video, length, ask=[length - video - 1]), cache=cache)
    other = {**prompt.feeds(video, length, ask=[0]), "input_ids": prompt.ids[None, video:length][:, ::-1].copy()}
    session.infer(other, cache=cache)
    again = session.infer(prompt.feeds(video, length, ask=[length - video - 1]), cache=cache)
    np.testing.assert_array_equal(first["logits"], again["logits"])


def test_bridging_ids_take_their_own_table(tiny_model):
    prompt = Prompt(tiny_model, 1, "the cat")
    session = TorchSession("language_model", tiny_model)
    feeds = prompt.feeds(0, 3, ask=[2])
    outputs = []
    for token in (tiny_model.spec.language.bridging_ids[0], tiny_model.spec.language.bridging_ids[1], 5):
        ids = prompt.ids[None, :3].copy()
        ids[0, 2] = token
        cache = session.allocate_cache(batch=1, capacity=8)
        outputs.append(session.infer({**feeds, "input_ids": ids}, cache=cache)["taps"])
    assert outputs[0].shape == (2, 1, 1, 64)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1 and np.abs(outputs[0] - outputs[2]).max() > 0.1
