"""Serve free answers of OpenVINO GenAI's VLM pipeline as a runner.

optimum-intel exports the folder; int8 weights are NNCF's. In fp32 OpenVINO is forced to fp32; in int8 it chooses: it
quantizes activations at run time, and computes floats in bf16 with an 8-bit KV cache if the CPU supports it.
"""

from __future__ import annotations

import time

import numpy as np
import openvino as ov
import openvino_genai as genai
from built import built
from openvino_settings import AUTO, settings
from protocol import Arrays, Loaded, Model, PeerError, Work, serve

FORMATS = {"fp32": "fp32", AUTO: "fp32", "int8": "int8"}
WORDS = {
    "fp32": "fp32",
    AUTO: "fp32 weights; OpenVINO chooses the precision of computation",
    "int8": "int8 weights by channel (NNCF); OpenVINO chooses the precision of computation and of the KV cache",
}


class Clock(genai.StreamerBase):
    """Collects ids and the times at which they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []
        self.times: list[float] = [time.perf_counter()]

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        self.ids += [token] if isinstance(token, int) else token
        self.times.append(time.perf_counter())
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def load(model: Model, precision: str, threads: int) -> Loaded:
    """See `protocol.serve`."""
    if precision not in FORMATS:
        raise PeerError(f"precision {precision}: this runner supports {', '.join(FORMATS)}")
    kind = FORMATS[precision]
    target = model.folder / f"openvino-{kind}"
    build_s = built(
        target,
        lambda out: [
            "-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", str(model.checkpoint),
            "--task", "image-text-to-text", "--weight-format", kind, str(out),
        ],
    )  # fmt: skip
    pipeline = genai.VLMPipeline(str(target), "CPU", **settings(precision, threads))

    def answer(inputs: Arrays) -> Work:
        text = str(inputs["prompt"])
        for i in range(len(inputs["images"])):
            text = text.replace("<image>", f"<ov_genai_image_{i}>", 1)
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = int(inputs["tokens"]), True
        config.do_sample, config.apply_chat_template = False, False

        def timed() -> Arrays:
            clock = Clock()
            images = [ov.Tensor(np.ascontiguousarray(image)) for image in inputs["images"]]
            pipeline.generate(text, images=images, generation_config=config, streamer=clock)
            began, first, *rest = clock.times
            last = rest[-1] if rest else first
            return {"ids": np.array(clock.ids), "first_s": np.array(first - began), "rest_s": np.array(last - first)}

        return Work(timed, tokens=config.max_new_tokens)

    versions = ("openvino", "openvino-genai", "optimum-intel", "nncf", "transformers")
    return Loaded({"answer": answer}, WORDS[precision], versions, build_s)


if __name__ == "__main__":
    serve(load)
