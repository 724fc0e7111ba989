"""Serve free answers of this runtime, or of transformers' `generate`, as a runner.

Usage: python benchmarks/text/runners/run_own.py ours|transformers (requests on stdin; see speed/peers/protocol.py,
which PYTHONPATH must name, as for all programs of this folder)
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from protocol import Arrays, Loaded, Model, PeerError, Work, serve


def load_ours(model: Model, precision: str, threads: int) -> Loaded:
    """Load this project's bundle in a precision."""
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.host.limits import Limits

    grounder = Grounder.load(model.bundles[precision], threads=threads)

    def answer(inputs: Arrays) -> Work:
        # A group is two frames; the peers take it as one image, which they repeat.
        clip = [(i / 2, frame) for i, frame in enumerate(np.repeat(inputs["images"], 2, axis=0))]
        message, tokens = str(inputs["message"]), int(inputs["tokens"])

        def timed() -> Arrays:
            times = [time.perf_counter()]
            limits = Limits(progress=lambda stage, done, total: times.append(time.perf_counter()))
            with grounder.open(clip) as video:
                stream = video.ask_within(limits, message, max_tokens=tokens)
                for _ in stream:
                    pass
            return answered(stream._decoding.ids, times)  # type: ignore[attr-defined]  # noqa: SLF001 - text has no ids

        return Work(timed, tokens=tokens)

    variants = {} if grounder.target is None else dict(grounder.target.variants)
    words = {"fp32": "fp32", "int8": "int8 weights by channel, activations in int8 by tensor; the rest in fp32"}
    return Loaded({"answer": answer}, f"{words[precision]}; variants {variants}", ("onnxruntime", "numpy"))


def load_transformers(model: Model, precision: str, threads: int) -> Loaded:
    """Load the folder as transformers' model in fp32."""
    if precision != "fp32":
        raise PeerError(f"precision {precision}: transformers is the reference and runs in fp32 only")
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.generation.streamers import BaseStreamer
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    torch.set_num_threads(threads)
    network = AutoModelForImageTextToText.from_pretrained(model.checkpoint, dtype=torch.float32).eval()
    pad = network.config.video_token_id

    class Clock(BaseStreamer):
        """Records when tokens arrive; the first call has the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def answer(inputs: Arrays) -> Work:
        ids, tokens = torch.from_numpy(inputs["input_ids"]), int(inputs["tokens"])

        def timed() -> Arrays:
            began, clock = time.perf_counter(), Clock()
            pixels = torch.from_numpy(np.repeat(inputs["images"], 2, axis=0)).permute(0, 3, 1, 2).float() / 127.5 - 1
            patches, *grid = Qwen3VLVideoProcessor.patchify(None, pixels[None], 16, 2, 2)
            with torch.no_grad():
                made = network.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=patches[0],
                    video_grid_thw=torch.tensor([grid]), mm_token_type_ids=2 * (ids == pad).long(),
                    max_new_tokens=tokens, do_sample=False, streamer=clock,
                )  # fmt: skip
            return answered(made[0, ids.shape[1] :].tolist(), [began, *clock.times[1:]])

        return Work(timed, tokens=tokens)

    return Loaded({"answer": answer}, "fp32, eager", ("torch", "transformers", "numpy"))


def answered(ids: list[int], times: list[float]) -> Arrays:
    """Return the outputs of a row: the ids, and seconds to the first token and from there to the last one."""
    return {"ids": np.array(ids), "first_s": np.array(times[1] - times[0]), "rest_s": np.array(times[-1] - times[1])}


if __name__ == "__main__":
    serve({"ours": load_ours, "transformers": load_transformers}[sys.argv[1]])
