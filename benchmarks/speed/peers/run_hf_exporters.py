"""Run the language model on text with onnxruntime, exported by transformers' own exporters, teacher-forced.

Two graphs, prefill and decode, each with its weights. The cache output of a step is bound as the next step's input
without a copy by this program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from built import built
from convert.qwen3_folder import write_qwen3_folder
from protocol import Arrays, Loaded, Model, PeerError, Work, serve

WORDS = {
    "fp32": "fp32, fused into onnxruntime's operators for CPU",
    "int8": "weights in int8 by channel, activations in uint8 by tensor, quantized at run time; the rest in fp32",
}
IN, OUT = "input.past_key_values.", ("output.past_key_values.", "past_key_values.")
HERE = Path(__file__).resolve().parent


class LanguageModel:
    """The two graphs and their KV cache."""

    def __init__(self, folder: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.sessions = {
            name: ort.InferenceSession(folder / name / "model.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("prefill", "decode")
        }
        self.cache: dict[str, Any] = {}

    def prefill(self, inputs: Arrays) -> Work:
        ids = inputs["input_ids"]
        return Work(lambda: {"logits": self._run("prefill", ids, 0)[0]}, tokens=ids.shape[1])

    def decode(self, inputs: Arrays) -> Work:
        prefix, steps = inputs["prefix_ids"], inputs["step_ids"]
        length = prefix.shape[1]
        self._run("prefill", prefix, 0)
        first = dict(self.cache)

        def before() -> None:
            self.cache = dict(first)

        def timed() -> Arrays:
            logits = [self._run("decode", ids[None], length + i) for i, ids in enumerate(steps[:, None])]
            return {"logits": np.concatenate(logits)}

        return Work(timed, before, tokens=len(steps))

    def _run(self, name: str, ids: np.ndarray, start: int) -> np.ndarray:
        """Run ids [1, L] after `start` cached tokens; return the logits [1, vocab] of the last."""
        session, length = self.sessions[name], ids.shape[1]
        binding = session.io_binding()
        feeds = {
            "input_ids": ids,
            "position_ids": np.arange(start, start + length)[None],
            "attention_mask": np.ones((1, start + length), np.int64),
        }
        for port in session.get_inputs():
            if port.name in feeds:
                binding.bind_cpu_input(port.name, feeds[port.name])
            else:
                binding.bind_ortvalue_input(port.name, self.cache[port.name.removeprefix(IN)])
        names = [port.name for port in session.get_outputs()]
        for output in names:
            binding.bind_output(output, "cpu")
        session.run_with_iobinding(binding)
        values = dict(zip(names, binding.get_outputs()))
        logits = values.pop("logits").numpy()[:, -1].copy()
        self.cache = {_layer(output): value for output, value in values.items()}
        return logits


def _layer(name: str) -> str:
    for prefix in OUT:
        name = name.removeprefix(prefix)
    return name


def load(model: Model, precision: str, threads: int) -> Loaded:
    """See `protocol.serve`."""
    if precision not in WORDS:
        raise PeerError(f"precision {precision}: this runner of transformers' exporter supports {' and '.join(WORDS)}")
    source = write_qwen3_folder(model.checkpoint, model.folder / "qwen3")
    target = model.folder / f"hf_exporters-{precision}"
    build_s = built(target, lambda out: [str(HERE / "convert/hf_export.py"), str(source), str(out), precision])
    language_model = LanguageModel(target, threads)
    rows = {"prefill_text": language_model.prefill, "decode": language_model.decode}
    return Loaded(rows, WORDS[precision], ("transformers", "onnxruntime"), build_s)


if __name__ == "__main__":
    serve(load)
