"""Downloaded models against transformers: the same frames give equal prompts, positions, pixels and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.bundle.contracts import graphs_of
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions
from bridge_stg.runtime.parity.recording import Call, RecordingSession
from tests.bridge_stg.checkpoint.plain_folders import FAMILIES, official_template, token_id
from tests.errors import raises

Messages = Sequence[tuple[str, str]]
FPS, TOKENS = 8.0, 200
QUESTION = "What happens when the red car turns?"
CONTEXT = [("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hi, what is it?")]
HISTORY = [("user", "What is this?"), ("assistant", "A <1.0 seconds> car."), ("user", "Why?"), ("assistant", "So.")]


def clip(frames: int, height: int, width: int) -> Iterator[tuple[float, np.ndarray]]:
    rng = np.random.default_rng(frames)
    for i in range(frames):
        yield i / FPS, rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)


class Pair:
    """A folder, transformers' model and processor of it, and the grounder of ours, which records its calls."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.family, self.calls = folder, family, list[Call]()
        self.theirs = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.model = load_checkpoint(folder)
        self.side = self.model.spec.vision.patch_size

    def grounder(self, model: BridgeSTG | None = None, **text: Any) -> Grounder:
        model = model or self.model
        assert model.tokenizer is not None
        self.calls.clear()
        sessions = {name: RecordingSession(TorchSession(name, model), self.calls) for name in graphs_of(model.spec)}
        return Grounder(sessions, model.spec, model.tokenizer, heads="text", text=TextOptions(**text))

    def fed(self, name: str) -> np.ndarray:
        """Return an input of all calls of the language model on one row, one after another."""
        return np.concatenate(
            [feeds[name][..., 0, :] for graph, feeds, _ in self.calls if graph == "language_model"], -1
        )

    def frames(self) -> np.ndarray:
        """Return the groups uint8 [G, P, height, width, 3] that the vision encoder got."""
        (found,) = [feeds["frames"] for graph, feeds, _ in self.calls if graph == "vision_encoder"]
        return found

    def text(self, message: str, kind: str, context: Messages = (), history: Messages = ()) -> str:
        """Return the published chat template's text; that of the folder is shorter, and prints the same."""
        chat: list[Any] = [{"role": role, "content": text} for role, text in (*context, *history, ("user", message))]
        content = [{"type": kind}, {"type": "text", "text": chat[len(context)]["content"]}]
        chat[len(context)]["content"] = content
        text, short = (
            render_jinja_template([chat], chat_template=template, add_generation_prompt=True)[0][0]
            for template in (official_template(self.family), (self.folder / "chat_template.jinja").read_text())
        )
        assert text == short
        return str(text)

    def processor(self) -> Any:
        """Return the family's processor with what writes text; its video processor needs torchvision."""
        kind = Qwen3VLProcessor if self.family == "qwen3_vl" else Qwen2_5_VLProcessor
        made = kind.__new__(kind)
        made.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
        made.image_processor = SimpleNamespace(merge_size=2)
        made.image_token, made.video_token = "<|image_pad|>", "<|video_pad|>"
        made.vision_start_token, made.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        return made

    def inputs(self, message: str, indices: list[int] | None, **chat: Messages) -> dict[str, Any]:
        """Return what the processor gives for the recorded frames; `indices` are those of a video's samples."""
        vision, groups = self.model.spec.vision, self.frames()
        kind, found = "image" if indices is None else "video", {}
        if indices is None:
            processor = Qwen2VLImageProcessorPil(
                patch_size=self.side, merge_size=2, image_mean=vision.image_mean, image_std=vision.image_std,
                do_resize=False,
            )  # fmt: skip
            found = dict(processor(groups[0, 0], return_tensors="pt"))
            visual = self.processor().replace_image_token(found, 0)
        else:
            mean, std = (np.float32(values) for values in (vision.image_mean, vision.image_std))
            frames = groups.reshape(-1, *groups.shape[2:])[: len(indices)]
            pixels = torch.from_numpy((frames.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)[None]
            patches, *grid = Qwen3VLVideoProcessor.patchify(None, pixels, self.side, 2, 2)
            found = {"pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid])}
            about = SimpleNamespace(fps=FPS, frames_indices=indices)
            visual = self.processor().replace_video_token({**found, "video_metadata": [about]}, 0)
            if self.family == "qwen2_5_vl":
                found["second_per_grid_ts"] = [2 * (indices[1] - indices[0]) / FPS]
        text = self.text(message, kind, **chat).replace(f"<|{kind}_pad|>", visual)
        ids = torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])
        types = (ids == token_id("<|image_pad|>")).int() + 2 * (ids == token_id("<|video_pad|>")).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **found}

    def check(self, inputs: dict[str, Any]) -> None:
        """Check the recorded prompt, positions and visual tokens, and the answer of `TOKENS` greedy ids."""
        prompt = inputs["input_ids"][0].numpy()
        ids, positions = self.fed("input_ids"), self.fed("positions")
        np.testing.assert_array_equal(ids[: len(prompt)], prompt)
        needed = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
        theirs, _ = self.theirs.model.get_rope_index(**needed)
        np.testing.assert_array_equal(positions[:, : len(prompt)], theirs[:, 0].numpy())
        with torch.no_grad():
            answer = self.theirs.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :].numpy()
        count = len(ids) - len(prompt)  # the last token of an answer is not fed
        assert count >= min(len(answer) - 1, TOKENS - 1) > 10
        np.testing.assert_array_equal(ids[len(prompt) :][: len(answer) - 1], answer[:count])


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, plain_folder: Callable[[str], Path]) -> Pair:
    return Pair(plain_folder(request.param), request.param)


@pytest.mark.parametrize(
    "frames, size, indices",
    [(12, (96, 128), [0, 4, 8]), (32, (64, 200), [0, 4, 8, 12, 16, 20, 24, 28]), (20, (260, 90), [0, 4, 8, 12, 16])],
)
def test_a_question_about_a_video(pair: Pair, frames: int, size: tuple[int, int], indices: list[int]) -> None:
    with pair.grounder() as grounder:
        "".join(grounder.ask(clip(frames, *size), QUESTION, max_tokens=TOKENS))
    pair.check(pair.inputs(QUESTION, indices))


@pytest.mark.parametrize("size", [(96, 128), (300, 61), (33, 350)])
def test_a_question_about_an_image(pair: Pair, size: tuple[int, int]) -> None:
    image = next(clip(1, *((side + 7) // 8 * 8 for side in size)))[1][: size[0], : size[1]]
    with pair.grounder() as grounder:
        "".join(grounder.ask(image, QUESTION, max_tokens=TOKENS))
    pair.check(pair.inputs(QUESTION, None))


@pytest.mark.parametrize("context", [CONTEXT[:1], CONTEXT[1:], CONTEXT, []], ids=["system", "turns", "both", "none"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_chat(pair: Pair, kind: str, context: Messages) -> None:
    source = clip(12, 96, 128) if kind == "video" else next(clip(1, 96, 128))[1]
    history = HISTORY if kind == "video" else HISTORY[:2]
    with pair.grounder() as grounder:
        "".join(grounder.ask(source, QUESTION, context=context, history=history, max_tokens=TOKENS))
    pair.check(pair.inputs(QUESTION, [0, 4, 8] if kind == "video" else None, context=context, history=history))


def test_a_tube_without_a_grammar(pair: Pair) -> None:
    """The model is random, so that its answer is no JSON; its ids are those of transformers."""
    text = pair.model.spec.text
    assert text is not None
    with (
        pair.grounder(mode="joint", grammar=False, drafts=False, max_tokens=TOKENS) as grounder,
        raises("query.unreadable_answer"),
    ):
        grounder.ground(clip(12, 96, 128), "the red car")
    pair.check(pair.inputs(text.tube.replace("{query}", "the red car"), [0, 4, 8]))


def test_frames_of_a_span_are_prompts_of_images(pair: Pair) -> None:
    """The second step of `two-step`: a batch of rows, each the family's own prompt of one image."""
    text = pair.model.spec.text
    assert text is not None
    with pair.grounder(mode="two-step", max_tokens=60) as grounder:
        grounder.ground(clip(24, 96, 128), "the red car", allow_none=False)
    *_, fine = [feeds["frames"] for graph, feeds, _ in pair.calls if graph == "vision_encoder"]
    rows = [feeds for graph, feeds, _ in pair.calls if graph == "language_model" and feeds["visual_index"].any()][1:]
    pair.calls[:] = [("vision_encoder", {"frames": fine[:1]}, {})]
    inputs = pair.inputs(text.image.replace("{query}", "the red car"), None)
    ids = inputs.pop("input_ids")[0]
    positions, _ = pair.theirs.model.get_rope_index(
        input_ids=ids[None], image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=inputs["mm_token_type_ids"]
    )
    assert rows and max(len(feeds["input_ids"]) for feeds in rows) > 1
    for feeds in rows:  # the last token of the prompt is fed with the first of the answer
        first = feeds["visual_index"].max(1) - (ids == token_id("<|image_pad|>")).sum().item()
        assert np.array_equal(first, np.arange(len(first)) * first[1] if len(first) > 1 else first)
        for row in range(len(feeds["input_ids"])):
            np.testing.assert_array_equal(feeds["input_ids"][row], ids[:-1])
            np.testing.assert_array_equal(feeds["positions"][:, row], positions[:, 0, :-1])


def test_a_new_checkpoint_answers_in_text_too(pair: Pair, tmp_path: Path) -> None:
    """A Qwen3-VL has the same prompt with both heads; the prompt of a Qwen2.5-VL prints times with bridge heads."""
    model = load_checkpoint(init_checkpoint(pair.folder, tmp_path / "checkpoint"))
    with pair.grounder(model) as grounder:
        assert grounder.heads == "text"
        answer = "".join(grounder.ask(clip(12, 96, 128), QUESTION, max_tokens=TOKENS))
    if pair.family == "qwen3_vl":
        pair.check(pair.inputs(QUESTION, [0, 4, 8]))
    else:
        printed = pair.tokenizer.decode(pair.fed("input_ids"))
        assert printed.count("<|vision_start|>") == printed.count("<|vision_end|>") == 2 and answer
