"""What reaches the model, against transformers' own processors: sizes, pixels, patches, times and chat text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as image_size
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_size
from transformers.utils.chat_template_utils import render_jinja_template

from bridge_stg.demo.tiny_model import demo_tokenizer_json
from bridge_stg.model.backbones import backbone
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.model.vision import VisionEncoder
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.prompt import Tokenizer, query_segment, time_strings, video_segment
from bridge_stg.runtime.video.frame import resize
from bridge_stg.runtime.video.sizes import smart_size
from tests.bridge_stg.model.stock_models import FAMILIES, TEXT, VISION

SIDES = {"qwen3_vl": (16, 2), "qwen2_5_vl": (14, 2)}


def model_spec(family: str) -> ModelSpec:
    adapter = backbone({"model_type": family})
    config = BridgeSTGConfig(
        backbone={"model_type": family, "vision_config": VISION, "text_config": TEXT},
        image_mean=adapter.image_mean, image_std=adapter.image_std, prompt=adapter.prompt(), frames=adapter.frames(),
    )  # fmt: skip
    return config.model_spec()


def test_frame_sizes_are_the_image_processors() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        factor = int(rng.choice([28, 32]))
        height, width = (int(size) for size in rng.integers(20, 2500, 2))
        low = int(rng.integers(4, 60)) * factor**2
        high = low + int(rng.integers(1, 900)) * factor**2
        ours = smart_size(height, width, factor=factor, min_pixels=low, max_pixels=high)
        assert ours == image_size(height, width, factor, low, high), (height, width, factor, low, high)


def test_frame_sizes_are_qwen3_vls_video_rule_shared_by_the_frames() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        frames = 2 * int(rng.integers(1, 40))
        height, width = (int(size) for size in rng.integers(40, 2500, 2))
        low, high = 4 * 32 * 32, int(rng.integers(8, 900)) * 32 * 32
        ours = smart_size(height, width, factor=32, min_pixels=low, max_pixels=high)
        theirs = video_size(frames, height, width, 2, 32, low * frames, high * frames)
        assert ours == theirs, (frames, height, width, high)


class Patches(torch.nn.Module):
    """A vision model whose patch embedding shows the pixels of each patch as they are."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        size = 3 * 2 * patch * patch
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv3d(3, size, (2, patch, patch), bias=False)
        self.patch_embed.proj.weight.data = torch.eye(size).reshape(size, 3, 2, patch, patch)


def our_patches(family: str, frames: np.ndarray) -> np.ndarray:
    """Return the patches [G·N, 3 · 2 · patch²] that the encoder embeds, of frames uint8 [G, 2, height, width, 3]."""
    patch, _ = SIDES[family]
    adapter = backbone({"model_type": family})
    values = {"hidden_size": 3 * 2 * patch * patch, "num_heads": 2, "patch_size": patch}
    config = adapter.config({"vision_config": {**VISION, **values}, "text_config": TEXT})
    spec = adapter.vision_spec(config, mean=adapter.image_mean, std=adapter.image_std)
    with torch.no_grad():
        return VisionEncoder(Patches(patch), spec).patchify(torch.from_numpy(frames)).flatten(0, 1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("height, width", [(97, 141), (300, 60), (64, 64)])
def test_an_image_is_resized_normalised_and_cut_as_by_the_processor(family: str, height: int, width: int) -> None:
    (patch, merge), adapter = SIDES[family], backbone({"model_type": family})
    limits = {"shortest_edge": 6 * (patch * merge) ** 2, "longest_edge": 20 * (patch * merge) ** 2}
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=merge, size=limits, image_mean=adapter.image_mean, image_std=adapter.image_std
    )
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    theirs = processor(image, return_tensors="np")
    size = smart_size(
        height, width, factor=patch * merge, min_pixels=limits["shortest_edge"], max_pixels=limits["longest_edge"]
    )
    assert [1, size[0] // patch, size[1] // patch] == theirs["image_grid_thw"][0].tolist()
    frames = np.stack([resize(image, size)] * 2)[None]  # an image is repeated to fill its group
    np.testing.assert_allclose(our_patches(family, frames), theirs["pixel_values"], atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_is_cut_into_temporal_patches_as_by_the_processor(family: str) -> None:
    (patch, merge), adapter = SIDES[family], backbone({"model_type": family})
    frames = np.random.default_rng(5).integers(0, 256, (5, 2 * patch * merge, 3 * patch * merge, 3), np.uint8)
    mean, std = (np.float32(values) for values in (adapter.image_mean, adapter.image_std))
    pixels = torch.from_numpy((frames.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)[None]
    theirs, *grid = Qwen3VLVideoProcessor.patchify(None, pixels, patch, merge, 2)
    assert grid == [3, 2 * merge, 3 * merge]
    filled = np.concatenate([frames, frames[-1:]])  # the last group is filled up by its last frame
    ours = our_patches(family, filled.reshape(3, 2, *frames.shape[1:]))
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=2e-6)


@pytest.mark.parametrize("count", [4, 7])
def test_group_times_are_printed_as_by_the_processor(count: int) -> None:
    indices, fps = [15 * i for i in range(count)], 30.0
    times = np.array([i / fps for i in indices] + [indices[-1] / fps] * (count % 2)).reshape(-1, 2)
    theirs = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2)  # noqa: SLF001 - no public way
    np.testing.assert_allclose(times.mean(1), theirs)
    ours = time_strings(times.mean(1), model_spec("qwen3_vl").prompt)
    assert ours == [f"<{time:.1f} seconds>" for time in theirs]


TEMPLATES = {
    # What the published templates of the two families say about messages of text and video.
    "qwen3_vl": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "qwen2_5_vl": (
        "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The demo's tokenizer, without its lower case."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps({**demo_tokenizer_json(), "normalizer": None}))
    return Tokenizer.from_file(path)


def processor(family: str) -> Any:
    """Return the family's processor with what writes text; its other parts need torchvision and a hub."""
    kind = Qwen3VLProcessor if family == "qwen3_vl" else Qwen2_5_VLProcessor
    made = kind.__new__(kind)
    made.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    made.video_token, made.vision_start_token, made.vision_end_token = (
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    return made


def render(family: str, content: list[dict[str, str]]) -> str:
    messages = [{"role": "user", "content": content}]
    (text,), _ = render_jinja_template([messages], chat_template=TEMPLATES[family], add_generation_prompt=True)
    return str(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_the_chat_template_around_the_video(family: str, tokenizer: Tokenizer) -> None:
    spec, groups, grid = model_spec(family), 3, (2, 3)
    video = video_segment(tokenizer, spec, [0.25, 1.25, 2.25], grid)
    query = query_segment(tokenizer, spec, "the dog", video.next_position)
    ours = tokenizer.decode([*video.input_ids, *query.input_ids])
    question = {"type": "text", "text": "Find the dog."}
    if family == "qwen3_vl":
        inputs = {
            "video_grid_thw": torch.tensor([[groups, 4, 6]]),
            "video_metadata": [SimpleNamespace(fps=2.0, frames_indices=[0, 1, 2, 3, 4, 5])],
        }
        written, text = (
            [processor(family).replace_video_token(inputs, 0)],
            render(family, [{"type": "video"}, question]),
        )
    else:
        # The family prints no times of its own: every group is a video of one step behind its time.
        times = [{"type": "text", "text": text} for text in ("<0.2 seconds>", "<1.2 seconds>", "<2.2 seconds>")]
        content = [part for time in times for part in (time, {"type": "video"})]
        written = [processor(family).replace_video_token({"video_grid_thw": torch.tensor([[1, 4, 6]])}, 0)] * groups
        text = render(family, [*content, question])
    (theirs,), _ = processor(family).get_text_with_replacements([text], [], written)
    assert ours == theirs
