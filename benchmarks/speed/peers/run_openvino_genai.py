"""Run a language model exported by optimum-intel with OpenVINO, its 8-bit or 4-bit weights quantized by NNCF.

The stateful model is run directly, teacher-forced, since OpenVINO GenAI's pipeline returns no logits; as in the
pipeline, only the logits of the last token are computed. The row `generate` runs that pipeline with the same prompt and
number of tokens, chosen greedily, including the first one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from built import built
from convert.qwen3_folder import write_qwen3_folder
from openvino import opset13 as ops
from openvino_settings import AUTO, settings, words
from protocol import Arrays, Loaded, Model, PeerError, Work, serve

FORMATS = {
    "fp32": ("fp32", ()),
    AUTO: ("fp32", ()),
    "int8": ("int8", ()),
    "int4": ("int4", ("--group-size", "128", "--ratio", "1.0")),
}


class LanguageModel:
    """The stateful model; setting OpenVINO's states restores the cache of a prefix."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        core = ov.Core()
        model = core.read_model(path)
        keep_last_token(model)
        self.compiled = core.compile_model(model, "CPU", settings(precision, threads))
        self.request = self.compiled.create_infer_request()
        self.names = {name for port in self.compiled.inputs for name in port.get_names()}

    def prefill(self, inputs: Arrays) -> Work:
        ids = inputs["input_ids"]
        return Work(lambda: {"logits": self._append(ids, 0)[0]}, self.request.reset_state, tokens=ids.shape[1])

    def decode(self, inputs: Arrays) -> Work:
        prefix, steps = inputs["prefix_ids"], inputs["step_ids"]
        length = prefix.shape[1]

        def before() -> None:
            self.request.reset_state()
            self._append(prefix, 0)

        def timed() -> Arrays:
            logits = [self._append(ids[None], length + i) for i, ids in enumerate(steps[:, None])]
            return {"logits": np.concatenate(logits)}

        return Work(timed, before, tokens=len(steps))

    def _append(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Run ids [1, L] after `start` cached tokens; return the logits [1, vocab] of the last."""
        length = ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, start + length), np.int64),
            "position_ids": np.arange(start, start + length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: value for name, value in feeds.items() if name in self.names})
        return self.request.get_output_tensor(0).data[:, -1].copy()


def keep_last_token(model: ov.Model) -> None:
    """Slice the hidden states before the head to the last token, as OpenVINO GenAI does."""
    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() not in ("MatMul", "Parameter"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        raise PeerError("the exported model has no MatMul before its logits")
    last = ops.slice(node.input_value(0), [-1], [2**31 - 1], [1], [1])
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def generate(folder: Path, precision: str, threads: int) -> Any:
    """Return the row of OpenVINO GenAI's pipeline, which is opened on first use."""
    pipelines: list[openvino_genai.LLMPipeline] = []

    def make(inputs: Arrays) -> Work:
        if not pipelines:
            options = {name: value for name, value in settings(precision, threads).items() if name != "NUM_STREAMS"}
            tokenizer = openvino_genai.Tokenizer(str(folder))
            pipelines.append(openvino_genai.LLMPipeline(str(folder), tokenizer, "CPU", **options))
        count = len(inputs["step_ids"])
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        prompt = ov.Tensor(np.ascontiguousarray(inputs["prefix_ids"]))

        def timed() -> Arrays:
            return {"ids": np.array(pipelines[0].generate(prompt, config).tokens[0])}

        return Work(timed, tokens=count)

    return make


def load(model: Model, precision: str, threads: int) -> Loaded:
    """See `protocol.serve`."""
    if precision not in FORMATS:
        raise PeerError(f"precision {precision}: this runner supports {', '.join(FORMATS)}")
    source = write_qwen3_folder(model.checkpoint, model.folder / "qwen3")
    kind, options = FORMATS[precision]
    target = model.folder / f"openvino_genai-{kind}"
    build_s = built(
        target,
        lambda out: [
            "-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", str(source), "--task",
            "text-generation-with-past", "--weight-format", kind, *options, str(out),
        ],
    )  # fmt: skip
    language_model = LanguageModel(target / "openvino_model.xml", precision, threads)
    rows = {
        "prefill_text": language_model.prefill,
        "decode": language_model.decode,
        "generate": generate(target, precision, threads),
    }
    said = f"{kind} weights; {words(language_model.compiled)}"
    return Loaded(rows, said, ("openvino", "openvino-genai", "optimum-intel", "nncf"), build_s)


if __name__ == "__main__":
    serve(load)
