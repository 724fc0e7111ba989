"""A tokenizer that gives other ids than the model was trained with is rejected, with the setting that does so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.demo.tiny_model import demo_config, demo_tokenizer_json
from bridge_stg.runtime.chain.prompt import query_segment
from bridge_stg.runtime.chain.tokenizer import load_tokenizer
from bridge_stg.runtime.errors import BundleError
from tests.errors import raises

SPEC = demo_config().model_spec()
LAST = demo_tokenizer_json()["added_tokens"][-1]["id"]
FIRST = LAST - 6
Values = dict[str, Any]


def write(folder: Path, change: Callable[[Values], object] = lambda values: None) -> Path:
    values = demo_tokenizer_json()
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


def words(values: Values) -> dict[str, int]:
    return values["model"]["vocab"]


def metaspace(values: Values) -> None:
    """Make it a Unigram model whose pieces begin with a mark for a space, as those of SentencePiece do."""
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    vocabulary = [[word.replace("Ġ", "▁"), -1.0] for word in words(values)]
    values["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}
    values |= {"pre_tokenizer": step, "decoder": step}


TEMPLATE = {
    "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [FIRST], "tokens": ["<|endoftext|>"]}},
}  # fmt: skip
LEFT_OVER = {
    "truncation": lambda v: v.update(
        truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    ),
    "padding": lambda v: v.update(
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"}
    ),
    "dropout": lambda v: v["model"].update(dropout=0.5),
    "tokens around a text": lambda v: v.update(post_processor=TEMPLATE),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OVER)
def test_settings_of_training_do_not_change_ids(tmp_path, name):
    query = "the red car that is moving to the left, then up, then down and out of the image"
    plain = query_segment(load_tokenizer(write(tmp_path), SPEC), SPEC, query, 0).input_ids
    changed = query_segment(load_tokenizer(write(tmp_path, LEFT_OVER[name]), SPEC), SPEC, query, 0).input_ids
    assert len(plain) > 20 and plain.tolist() == changed.tolist()


REJECTED = {
    "an id of another token": (lambda v: v["added_tokens"][1].update(id=5), ["<|im_start|>", 5, FIRST + 1]),
    "an id with a gap": (lambda v: v["added_tokens"][-1].update(id=5000), ["<|video_pad|>", 5000, LAST]),
    "one id for two words": (lambda v: words(v).update(red=words(v)["the"]), ["'red'", "'the'"]),
    "no token for a marker": (lambda v: v["added_tokens"][1].update(content="<|other|>"), ["<|im_start|>"]),
    "no token for visual tokens": (lambda v: v["added_tokens"][-1].update(content="<|other|>"), ["<|video_pad|>"]),
    "a token that takes the line break": (lambda v: v["added_tokens"][2].update(rstrip=True), ["im_end|>\\n"]),
    "a missing byte": (
        lambda v: (words(v).update({"zz": words(v).pop("z")}), v.update(normalizer=None)), ["xyz", "BPE"]
    ),
    "a space before every text": (
        lambda v: v["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), ["add_prefix_space"]
    ),
    "a normalizer that removes line breaks": (
        lambda v: v.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}), ["Strip", "\\n"]
    ),
    "pieces with a mark for a space": (metaspace, ["Metaspace", "Unigram"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_other_ids_are_rejected_with_their_cause(tmp_path, name):
    change, values = REJECTED[name]
    path = write(tmp_path, change)
    with raises("bundle.bad_tokenizer", path, "qwen3_vl", *values, kind=BundleError):
        load_tokenizer(path, SPEC)


def test_a_vocabulary_smaller_than_the_ids_is_rejected(tmp_path):
    def fit(size: int) -> Any:
        return dataclasses.replace(SPEC, language=dataclasses.replace(SPEC.language, vocab_size=size))

    path = write(tmp_path)
    load_tokenizer(path, fit(LAST + 1))
    with raises("bundle.bad_tokenizer", LAST, "<|video_pad|>", kind=BundleError):
        load_tokenizer(path, fit(LAST))
