"""Downloaded models: text heads with the folder's own weights, chat template, stop ids and limits of frames."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bridge_stg.checkpoint.checkpoint import load_checkpoint, load_config
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from bridge_stg.checkpoint.plain_folder import plain_summary
from bridge_stg.model.config import BridgeSTGConfig
from tests.bridge_stg.checkpoint.plain_folders import (
    FAMILIES,
    TEMPLATES,
    change_json,
    make_plain_folder,
    official_template,
    token_id,
)
from tests.bridge_stg.checkpoint.test_lora import QUERY, add_adapter
from tests.errors import raises

HEADS = {
    "qwen3_vl": "<|im_start|>user\n<|vision_start|>",
    "qwen2_5_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    ),
}  # fmt: skip
TURN = "<|vision_end|>{message}<|im_end|>\n<|im_start|>assistant\n"
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp("plain") / family for family in FAMILIES}
    for family, folder in folders.items():
        make_plain_folder(folder, family, layers=3)
    return folders


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(made[family], tmp_path / "model"))


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shards, tied", [(1, True), (3, False)])
def test_a_model_with_the_folders_weights(
    tmp_path: Path, family: str, dtype: torch.dtype, shards: int, tied: bool
) -> None:
    plain = make_plain_folder(tmp_path / "model", family, shards=shards, tied=tied, dtype=dtype)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (shards > 1)
    model = load_checkpoint(tmp_path / "model")
    assert model.tied == tied and model.spec.heads == "text" and model.spec.language.num_bridging_queries == 0
    assert not hasattr(model, "spatial_decoder") and model.language_model.bridging is None
    expected = plain.state_dict()
    for key, value in model.vision_encoder.model.state_dict().items():
        assert torch.equal(value, expected[f"model.visual.{key}"].float()), key
    for key, value in model.language_model.model.state_dict().items():
        assert torch.equal(value, expected[f"model.language_model.{key}"].float()), key
    assert torch.equal(model.language_model.lm_head.weight, expected["lm_head.weight"].float())


def test_an_adapter_is_merged(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_vl")
    before = load_checkpoint(folder).state_dict()
    rows, columns = before["language_model.model.layers.0.self_attn.q_proj.weight"].shape
    add_adapter(
        folder, {f"{QUERY}.lora_A.weight": torch.ones(2, columns), f"{QUERY}.lora_B.weight": torch.ones(rows, 2)}
    )
    after = load_checkpoint(folder).state_dict()
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed == ["language_model.model.layers.0.self_attn.q_proj.weight"]


@each_family
@pytest.mark.parametrize("source", ["short", "official", "none"])
def test_the_prompt_is_the_chat_template(tmp_path: Path, family: str, source: str) -> None:
    """The default of a family is what its published template prints."""
    template = {"short": TEMPLATES[family], "official": official_template(family), "none": False}[source]
    make_plain_folder(tmp_path, family, template=template)
    config = load_config(tmp_path)
    assert config.text is not None and config.prompt.head == config.text.image_head == HEADS[family]
    assert config.text.video_turn == config.text.image_turn == TURN
    for role in ("system", "user", "assistant"):
        assert getattr(config.text, f"{role}_turn") == f"<|im_start|>{role}\n{{message}}<|im_end|>\n"
    assert config.prompt.prints_times == (family == "qwen3_vl")
    said = plain_summary(tmp_path)
    assert family in said and ("no chat template" if source == "none" else "chat_template.jinja") in said


@pytest.mark.parametrize("file", ["chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("several", [False, True])
def test_older_places_of_a_template(copy: Callable[[str], Path], file: str, several: bool) -> None:
    folder = copy("qwen3_vl")
    template = (folder / "chat_template.jinja").read_text().replace("<|im_start|>assistant\n", "<|im_start|>robot\n")
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "{{ tools }}"}, {"name": "default", "template": template}]
    (folder / file).write_text(json.dumps({"chat_template": named if several else template}))
    text = load_config(folder).text
    assert text is not None and text.video_turn.endswith("<|im_start|>robot\n") and file in plain_summary(folder)


def test_a_template_that_can_answer_without_a_thought_does(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_vl")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace(
        "assistant\n", "assistant\n<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}"
    ))  # fmt: skip
    text = load_config(folder).text
    assert text is not None and text.video_turn.endswith("assistant\n<think>\n</think>\n\n")


@pytest.mark.parametrize(
    "changed",
    [
        lambda text: "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + text,
        lambda text: text.replace("{% for message in messages %}", "{% for message in messages[-1:] %}"),
        lambda text: text.replace("{{ message.content }}", "{{ message.content }}{{ loop.index }}"),
        lambda text: text.replace("<|im_end|>\n", ""),
    ],
    ids=["no system message", "one message", "numbers", "no ends"],
)  # fmt: skip
def test_a_template_that_prints_no_chats(copy: Callable[[str], Path], changed: Callable[[str], str]) -> None:
    folder = copy("qwen3_vl")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(changed(template))
    text = load_config(folder).text
    assert text is not None and text.system_turn is text.user_turn is text.assistant_turn is None
    assert "no system messages" in plain_summary(folder)
    assert "{message}" in text.video_turn


@each_family
def test_messages_have_the_query_once(made: dict[str, Path], family: str) -> None:
    text = load_config(made[family]).text
    assert text is not None and text.box_scale == {"qwen3_vl": 1000, "qwen2_5_vl": 0}[family]
    for message in (text.tube, text.span, text.image):
        assert message.count("{query}") == 1
    assert '"bbox_2d"' in text.tube and '"start"' in text.span and "bbox" in text.image


@each_family
def test_answers_end_as_generation_config_says(copy: Callable[[str], Path], family: str) -> None:
    folder = copy(family)
    end, pad = token_id("<|im_end|>"), token_id("<|endoftext|>")
    text = load_config(folder).text
    assert text is not None and text.stop_ids == (end, pad)
    assert text.repetition_penalty == {"qwen3_vl": 1.0, "qwen2_5_vl": 1.05}[family]
    change_json(folder / "generation_config.json", eos_token_id=pad, repetition_penalty=None)
    text = load_config(folder).text
    assert text is not None and text.stop_ids == (pad,) and text.repetition_penalty == 1.0
    (folder / "generation_config.json").unlink()
    text = load_config(folder).text
    assert text is not None and text.stop_ids == (end,)  # of config.json
    values = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", eos_token_id=None, text_config=values["text_config"] | {"eos_token_id": None})
    change_json(folder / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    text = load_config(folder).text
    assert text is not None and text.stop_ids == (pad,)


def test_answers_end_as_the_prompt_ends_messages(copy: Callable[[str], Path]) -> None:
    """Nothing in the folder names a stop id: it is the special token after a message, if there is one."""
    folder = copy("qwen3_vl")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", eos_token_id=None, text_config=values["text_config"] | {"eos_token_id": None})
    template = folder / "chat_template.jinja"
    for closing, token in (("<|im_end|>", "<|im_end|>"), ("<|endoftext|>", "<|endoftext|>"), ("</tool_call>", "")):
        template.write_text(TEMPLATES["qwen3_vl"].replace("<|im_end|>", closing))
        text, said = load_config(folder).text, plain_summary(folder)
        assert text is not None and text.stop_ids == ((token_id(token),) if token else ())
        assert ("no token ends an answer" in said) == (not token) and "\n" not in said
    template.unlink()
    text = load_config(folder).text
    assert text is not None and text.stop_ids == (token_id("<|im_end|>"),)


def test_frames_are_never_above_the_folders_limits(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_vl")
    frames, token = load_config(folder).frames, 32**2
    assert (frames.coarse_max_pixels, frames.fine_max_pixels) == (256 * token, 768 * token)
    assert frames.max_visual_tokens == 24576 // 2  # a group is two frames of the video processor's limit
    change_json(folder / "preprocessor_config.json", size={"shortest_edge": token, "longest_edge": 50 * token})
    frames = load_config(folder).frames
    assert (frames.coarse_max_pixels, frames.fine_max_pixels, frames.fine_min_pixels) == (50 * token,) * 3
    (folder / "video_preprocessor_config.json").unlink()
    assert load_config(folder).frames.max_visual_tokens is None


def test_frames_of_qwen2_5_vl_have_limits_each(copy: Callable[[str], Path]) -> None:
    folder, token = copy("qwen2_5_vl"), 28**2
    change_json(folder / "preprocessor_config.json", max_pixels=300 * token)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 100 * token}}))
    frames = load_config(folder).frames
    assert (frames.coarse_max_pixels, frames.fine_max_pixels) == (100 * token, 300 * token)
    assert frames.max_visual_tokens is None


@each_family
def test_init_keeps_the_ways_to_answer_in_text(made: dict[str, Path], tmp_path: Path, family: str) -> None:
    config = BridgeSTGConfig.load(init_checkpoint(made[family], tmp_path / "checkpoint"))
    plain = load_config(made[family])
    assert config.heads == "bridge" and config.text is not None and plain.text is not None
    assert config.text.image_turn == plain.text.image_turn and config.text.stop_ids == plain.text.stop_ids
    # Every group of a Qwen2.5-VL video closes itself, after its printed time.
    assert config.text.video_turn == TURN.removeprefix("" if family == "qwen3_vl" else "<|vision_end|>")


def test_init_goes_on_without_a_usable_template(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder, said = copy("qwen3_vl"), list[str]()
    thinking(folder)
    config = BridgeSTGConfig.load(init_checkpoint(folder, tmp_path / "checkpoint", progress=said.append))
    assert config.text is None and "<think>" in said[0]


def text_only(folder: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def thinking(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n", "assistant\n<think>\n"))


def broken_index(folder: Path) -> None:
    weights = folder / "model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    weights.unlink()


def named_by_a_list(folder: Path) -> None:
    """Name one template wrongly; the default one is used, and it is for text only."""
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": ["x"], "template": "x"}, {"name": "default", "template": "x"}]
    change_json(folder / "tokenizer_config.json", chat_template=templates)


def no_stop_ids(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    values["text_config"].pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": None}))
    change_json(folder / "tokenizer.json", added_tokens=[5])


REJECTED: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "a template of text": (text_only, "checkpoint.bad_chat_template", ("chat_template.jinja", "<|video_pad|>")),
    "a template that raises": (
        lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no video') }}"),
        "checkpoint.bad_chat_template", ("chat_template.jinja", "no video"),
    ),
    "a template that is not text": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "checkpoint.bad_chat_template", ("jinja",),
    ),
    "a thinking model": (thinking, "checkpoint.thinking_model", ("chat_template.jinja", "<think>", "Instruct")),
    "Qwen2-VL": (
        lambda f: change_json(f / "config.json", model_type="qwen2_vl"),
        "checkpoint.wrong_model_type", ("'qwen2_vl'", "qwen3_vl", "qwen2_5_vl"),
    ),
    "quantized": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "awq"}),
        "checkpoint.unsupported_dtype", ("awq",),
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "checkpoint.missing_file", ("tokenizer.json",)),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "checkpoint.missing_file", ("model.safetensors",)),
    "a missing shard": (broken_index, "checkpoint.missing_file", ("model-1.safetensors",)),
    "a stop id that is text": (
        lambda f: change_json(f / "generation_config.json", eos_token_id="<|im_end|>"),
        "checkpoint.bad_config", ("generation_config.json", "eos_token_id"),
    ),
    "a penalty that is text": (
        lambda f: change_json(f / "generation_config.json", repetition_penalty="1"),
        "checkpoint.bad_config", ("generation_config.json", "repetition_penalty"),
    ),
    "a limit that is true": (
        lambda f: change_json(f / "preprocessor_config.json", max_pixels=True),
        "checkpoint.bad_config", ("preprocessor_config.json", "longest_edge"),
    ),
    "a template whose name is a list": (
        named_by_a_list, "checkpoint.bad_chat_template", ("tokenizer_config.json",),
    ),
    "added tokens that are numbers": (no_stop_ids, "checkpoint.bad_tokenizer", ("tokenizer.json",)),
    "added tokens of another form": (
        lambda f: change_json(f / "tokenizer_config.json", added_tokens_decoder={"1": 5}),
        "checkpoint.bad_tokenizer", ("model",),
    ),
    "a limit that is text": (
        lambda f: change_json(f / "preprocessor_config.json", size={"longest_edge": "large"}),
        "checkpoint.bad_config", ("preprocessor_config.json", "longest_edge"),
    ),
    "a tokenizer without images": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("image_pad", "image")),
        "checkpoint.bad_tokenizer", ("<|image_pad|>",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_folders_that_are_rejected(copy: Callable[[str], Path], case: str) -> None:
    folder = copy("qwen3_vl")
    change, code, words = REJECTED[case]
    change(folder)
    with raises(code, *words):
        load_checkpoint(folder)
