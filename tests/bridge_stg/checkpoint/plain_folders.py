"""Folders of random Qwen3-VL and Qwen2.5-VL models as they are downloaded: weights, tokenizer and configs."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2_5_VLConfig, Qwen3VLConfig

FAMILIES = ("qwen3_vl", "qwen2_5_vl")

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Added tokens that are not special. Names and order are those of Qwen's tokenizer.json."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer.json splits text before byte-level BPE."""
WORDS = 400  # tokens without the added ones
VOCABULARY = 512  # rows of the embedding table: more than the tokenizer has, as in the published models
TURNS = (
    "{% for message in messages %}HEAD<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type in ('image', 'video') %}"
    "<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = (
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
TEMPLATES = {"qwen3_vl": TURNS.replace("HEAD", ""), "qwen2_5_vl": TURNS.replace("HEAD", SYSTEM)}
"""Short templates that print messages as the official ones do, see `official_template`."""


def official_template(family: str) -> str:
    """Return the published chat template of a family, which the package trl contains."""
    found = importlib.util.find_spec("trl")
    assert found is not None and found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{family}.jinja").read_text(encoding="utf-8")


def make_plain_folder(
    folder: Path,
    family: str,
    *,
    layers: int = 2,
    template: bool | str = True,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Write a folder as it is downloaded, and return transformers' model with its weights.

    Args:
        folder: the folder to create.
        family: of `FAMILIES`.
        layers: layers of the language model.
        template: whether the folder has a chat template, or its text.
        shards: about how many weight files there are; with more than one there is an index.
        dtype: dtype of the weights.
        tied: whether the head is the embedding table; None: in Qwen3-VL only.
        seed: seed of the weights.
    """
    tied = family == "qwen3_vl" if tied is None else tied
    model = random_weights(family, layers=layers, tied=tied, seed=seed).to(dtype)
    model.generation_config.eos_token_id = [token_id("<|im_end|>"), token_id("<|endoftext|>")]
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    model.generation_config.repetition_penalty = 1.0 if family == "qwen3_vl" else 1.05
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards + 1)
    qwen_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    write_json(folder / "preprocessor_config.json", preprocessor(family, tokens=16384))
    if family == "qwen3_vl":
        write_json(folder / "video_preprocessor_config.json", preprocessor(family, tokens=24576))
    if template:
        text = TEMPLATES[family] if template is True else template
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return model


def random_weights(family: str, *, layers: int, tied: bool, seed: int) -> PreTrainedModel:
    """Return transformers' model with random weights of a seed; see `randomize`."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(plain_config(family, layers=layers, tied=tied))
    return randomize(model, tied=tied)


def randomize(model: PreTrainedModel, *, tied: bool) -> PreTrainedModel:
    """Return a model in eval mode with random weights that make every output depend on every input."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "pos_embed" in name:
                # A tied head repeats the token that it sees, unless the layers say more than the embedding.
                torch.nn.init.normal_(parameter, std=0.1 if tied or "pos_embed" in name else 1.0)
            elif parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            else:
                torch.nn.init.uniform_(parameter, 0.7, 1.3)
    return model.eval()


def plain_config(family: str, *, layers: int, tied: bool) -> Any:
    """Return transformers' config of a model of some 150,000 parameters."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    ids = {
        key: token_id(token)
        for key, token in (
            ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
        )
    }  # fmt: skip
    if family == "qwen3_vl":
        text |= {"head_dim": 16}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 16}
        return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    vision |= {"fullatt_block_indexes": [1], "patch_size": 14, "window_size": 56, "tokens_per_second": 2}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


@cache
def qwen_tokenizer() -> Tokenizer:
    """Return a tokenizer of Qwen's kind, whose words are learned from prompts and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    # Every token gets the same id again, however many words the corpus gave.
    count = tokenizer.get_vocab_size()
    assert count == WORDS, count
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(PLAIN_TOKENS))
    return tokenizer


def token_id(token: str) -> int:
    """Return the id of one of the added tokens."""
    return WORDS + (*SPECIAL_TOKENS, *PLAIN_TOKENS).index(token)


def tokenizer_config() -> dict[str, Any]:
    """Return the values of tokenizer_config.json."""
    added = {
        str(token_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in (*SPECIAL_TOKENS, *PLAIN_TOKENS)
    }  # fmt: skip
    return {
        "added_tokens_decoder": added, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
        "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip


def preprocessor(family: str, *, tokens: int) -> dict[str, Any]:
    """Return the values of a processor's config; `tokens` limits its images, or the groups of a whole video."""
    if family == "qwen3_vl":
        return {
            "size": {"shortest_edge": 4 * 32**2, "longest_edge": tokens * 32**2}, "patch_size": 16, "merge_size": 2,
            "temporal_patch_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        }  # fmt: skip
    return {
        "min_pixels": 4 * 28**2, "max_pixels": tokens * 28**2, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    """Replace values of a JSON file; None removes one."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in values.items() if value is not None})


def _corpus() -> list[str]:
    boxes = [
        f'{{"time": {i / 2:.1f}, "bbox_2d": [{i * 37 % 1000}, {i * 91 % 1000}, {i * 53 % 1000}, {i * 17 % 1000}], '
        f'"label": "{name}"}}'
        for i, name in enumerate(("the red car", "a man who walks", "the dog", "") * 8)
    ]
    return [
        "```json\n[\n\t" + ",\n\t".join(boxes) + "\n]\n```",
        "[" + ", ".join(boxes) + "]",
        '{"start": 1.0, "end": 2.5}',
        "<1.0 seconds><2.5 seconds> Given the query, for each frame, detect and localize the visual content described "
        "by the given textual query in JSON format. Locate it, output its bbox coordinates using JSON format.",
        "You are a helpful assistant. system user assistant\n What happens? When does it happen in the video?\n",
    ]
