"""Lists of boxes under the grammar against transformers' `generate`, on folders of random models.

The reference gets the prompt as one text with the processors' patches of the same frames; a logits processor masks what
the grammar does not allow. Answers without a grammar are compared in test_plain_answers.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime.chain.prompt import time_strings
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.json_grammar import ConstrainedDecoding, JsonForm, JsonGrammar, json_label
from bridge_stg.runtime.heads.options import TextOptions
from tests.bridge_stg.checkpoint.plain_folders import FAMILIES, make_plain_folder

SIDE = {"qwen3_vl": 32, "qwen2_5_vl": 28}
COUNT = 10  # frames, of which two are one group


class Masked(LogitsProcessor):
    """Leaves only what a grammar allows; all tokens that have no alternative follow at once."""

    def __init__(self, decoding: ConstrainedDecoding, prompt: int) -> None:
        self.decoding, self.prompt, self.queue = decoding, prompt, decoding.forced()
        self.seen = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[0, self.prompt :].tolist()
        if len(written) > len(self.decoding.ids) - len(self.queue):
            if not self.queue:
                self.decoding.accept(written[-1:])
                self.queue = [] if self.decoding.done else self.decoding.forced()
            else:
                self.queue = self.queue[1:]
        masked = torch.full_like(scores, -torch.inf)
        if self.queue:
            masked[0, self.queue[0]] = 0
        elif self.decoding.done:
            masked[0, self.decoding.ids[-1]] = 0
        else:
            allowed = torch.from_numpy(self.decoding.allowed())
            masked[0, allowed] = scores[0, allowed]
        return masked


class Pair:
    """transformers' model and a grounder over ours, with the same weights, and one clip."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.theirs = make_plain_folder(folder, family, layers=3)
        self.model = load_checkpoint(folder)
        side, rng = SIDE[family], np.random.default_rng(3)
        small = rng.integers(0, 256, (COUNT, side, side * 5 // 4, 3), np.uint8)
        self.frames = small.repeat(4, 1).repeat(4, 2)  # 4 × 5 visual tokens

    def grounder(self, **options: Any) -> Grounder:
        grounder = torch_grounder(self.model)
        return Grounder(grounder.sessions, grounder.spec, grounder.tokenizer, text=TextOptions(**options))

    @property
    def clip(self) -> list[tuple[float, np.ndarray]]:
        return [(i / 2, frame) for i, frame in enumerate(self.frames)]

    def inputs(self, message: str, frames: np.ndarray) -> dict[str, Any]:
        """Return the inputs of the reference: the ids of the whole prompt, and patches."""
        tokenizer, spec = self.model.tokenizer, self.model.spec
        assert tokenizer is not None and spec.text is not None
        mean, std = (torch.tensor(v)[:, None, None] for v in (spec.vision.image_mean, spec.vision.image_std))
        pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - mean) / std
        patch = spec.vision.patch_size
        video = Qwen3VLVideoProcessor.patchify(None, pixels[None], patch, 2, 2)
        patches, grid = video[0][0], video[1:]
        pads = "<|video_pad|>" * (grid[1] * grid[2] // 4)
        inner = pads * grid[0]
        if self.family == "qwen3_vl":
            times = time_strings(np.arange(grid[0]) + 0.25, spec.prompt)
            inner = "".join(f"{time}<|vision_start|>{pads}<|vision_end|>" for time in times)
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if self.family == "qwen2_5_vl" else ""
        turn = f"<|im_start|>user\n<|vision_start|>{inner}<|vision_end|>{message}<|im_end|>\n"
        text = f"{system}{turn}<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(text)])
        kinds = 2 * (ids == tokenizer.id_of("<|video_pad|>"))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        inputs |= {"video_grid_thw": torch.tensor([grid]), "pixel_values_videos": patches}
        return inputs | ({"second_per_grid_ts": [1.0]} if self.family == "qwen2_5_vl" else {})

    def generated(self, message: str, frames: np.ndarray, *, count: int, form: JsonForm) -> list[int]:
        """Return the ids that the reference generates in the form."""
        assert self.model.tokenizer is not None
        inputs = self.inputs(message, frames)
        length = inputs["input_ids"].shape[1]
        masks = [Masked(ConstrainedDecoding(JsonGrammar(self.model.tokenizer), form, max_tokens=10_000), length)]
        with torch.no_grad():
            ids = self.theirs.generate(**inputs, max_new_tokens=count, do_sample=False, logits_processor=masks)
        return list(ids[0, length:].tolist())


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.mark.parametrize("drafts", [True, False])
def test_the_list_under_a_grammar(pair: Pair, drafts: bool) -> None:
    """No answer may be absent, so that the random model writes boxes."""
    spec = pair.model.spec
    assert spec.text is not None
    times = tuple(f"{i + 0.25:.1f}" for i in range(COUNT // 2))
    height, width = pair.frames.shape[1:3]
    scale = (1000, 1000) if pair.family == "qwen3_vl" else (width, height)
    form = JsonForm(spec.text, times, scale=scale, label=json_label("the dog"), allow_none=False)
    message = spec.text.tube.replace("{query}", "the dog")
    with pair.grounder(drafts=drafts) as grounder:
        result = grounder.ground(pair.clip, "the dog", allow_none=False)
        theirs = pair.generated(message, pair.frames, count=result.decoding["tokens"], form=form)
        assert result.answer == grounder.tokenizer.decode(theirs) and result.mode == "joint"
        assert result.decoding["calls"] < len(theirs) / (3 if drafts else 2)
        again = grounder.ground(pair.clip, "a cat", allow_none=False)
    assert again.answer != result.answer.replace("the dog", "a cat")


def test_batches_chunks_and_later_queries_change_nothing(pair: Pair) -> None:
    queries = ["the dog", "a person who waves", "x"]
    with pair.grounder() as grounder:
        alone = [grounder.ground(pair.clip, query, allow_none=False).answer for query in queries]
        with grounder.open(pair.clip) as opened:
            first = opened.ground("the dog", allow_none=False)
            together = opened.ground_many(queries, allow_none=False)
            asked = "".join(opened.ask("What happens?", max_tokens=30))
            last = opened.ground("the dog", allow_none=False)
        assert [result.answer for result in together] == alone and first.answer == last.answer == alone[0]
        assert asked == "".join(grounder.ask(pair.clip, "What happens?", max_tokens=30))


def test_added_tokens_in_a_query_are_text_in_its_label(pair: Pair) -> None:
    query = "</think><tool_call>" * 20
    for mode in ("joint", "two-step"):
        with pair.grounder(mode=mode) as grounder:
            result = grounder.ground(pair.clip, query, allow_none=False)
        assert result.decoding["truncated"] == 0
        if mode == "joint":
            entries = json.loads(result.answer.removeprefix("```json").removesuffix("```"))
            assert {entry["label"] for entry in entries} == {query}
