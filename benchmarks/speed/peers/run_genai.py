"""Run the language model on text with onnxruntime-genai, exported by its model builder, teacher-forced.

The builder's defaults for CPU: GroupQueryAttention over one buffer for past and present; q, k and v fused; 8-bit and
4-bit weights as MatMulNBits that computes in int8 (accuracy level 4). `prune_lm_head` computes only the logits of the
last token, as in the other runners.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime_genai as og
from built import built
from convert.qwen3_folder import write_qwen3_folder
from protocol import Arrays, Loaded, Model, PeerError, Work, serve

WORDS = {
    "fp32": "fp32",
    "int8": "8-bit weights in blocks, activations in int8 by row (MatMulNBits, accuracy level 4); the rest in fp32",
    "int4": "4-bit weights in blocks, activations in int8 by row (MatMulNBits, accuracy level 4); the rest in fp32",
}
OPTIONS = {
    "fp32": ("prune_lm_head=true",),
    "int8": ("prune_lm_head=true",),
    "int4": ("prune_lm_head=true",),
}


class LanguageModel:
    """A generator that is created per prompt and rewound between repetitions."""

    def __init__(self, model: og.Model) -> None:
        self.model = model
        self.generator: og.Generator | None = None

    def prefill(self, inputs: Arrays) -> Work:
        ids = inputs["input_ids"][0].astype(np.int32)

        def before() -> None:
            self.generator = self._generator(len(ids) + 1)

        def timed() -> Arrays:
            return {"logits": self._append(ids)}

        return Work(timed, before, tokens=len(ids))

    def decode(self, inputs: Arrays) -> Work:
        prefix, steps = inputs["prefix_ids"][0].astype(np.int32), inputs["step_ids"].astype(np.int32)
        self.generator = self._generator(len(prefix) + len(steps) + 1)
        self._append(prefix)

        def before() -> None:
            assert self.generator is not None
            if self.generator.token_count() > len(prefix):
                self.generator.rewind_to(len(prefix))

        def timed() -> Arrays:
            return {"logits": np.stack([self._append(step) for step in steps[:, None]])}

        return Work(timed, before, tokens=len(steps))

    def _generator(self, capacity: int) -> og.Generator:
        self.generator = None  # free its cache before the next one is allocated
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=capacity, batch_size=1)
        return og.Generator(self.model, parameters)

    def _append(self, ids: np.ndarray) -> np.ndarray:
        """Run ids [L] after the cached tokens; return the logits [vocab] of the last."""
        assert self.generator is not None
        self.generator.append_tokens(ids)
        return self.generator.get_logits()[0, -1].copy()


def load(model: Model, precision: str, threads: int) -> Loaded:
    """See `protocol.serve`."""
    if precision not in WORDS:
        raise PeerError(f"precision {precision}: this runner supports {', '.join(WORDS)}")
    source = write_qwen3_folder(model.checkpoint, model.folder / "qwen3")
    target = model.folder / f"genai-{precision}"
    build_s = built(
        target,
        lambda out: [
            "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out), "-p", precision, "-e", "cpu",
            "-c", str(out / "cache"), "--extra_options", *OPTIONS[precision],
        ],
    )  # fmt: skip
    config = og.Config(str(target))
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    language_model = LanguageModel(og.Model(config))
    rows = {"prefill_text": language_model.prefill, "decode": language_model.decode}
    return Loaded(rows, WORDS[precision], ("onnxruntime-genai", "onnxruntime"), build_s)


if __name__ == "__main__":
    serve(load)
