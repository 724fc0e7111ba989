"""Run this project's graphs with OpenVINO: vision encoder, language model and spatial decoder in `primitive`.

The int8 graphs are the Q/DQ graphs that this runtime runs. In this variant the language model's cache is an input and
its new rows an output; this program appends the rows, as the runtime does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
from openvino_settings import AUTO, compile_file, words
from protocol import Arrays, Loaded, Model, PeerError, Work, serve

GRAPHS = {"vision": "vision_encoder", "prefill": "language_model", "spatial": "spatial_decoder"}


class Graph:
    """One compiled graph, fed by names."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        self.compiled = compile_file(path, precision, threads)
        self.request = self.compiled.create_infer_request()

    def __call__(self, feeds: Arrays) -> dict[str, np.ndarray]:
        self.request.infer({name: np.ascontiguousarray(value) for name, value in feeds.items()}, share_inputs=True)
        return {port.get_any_name(): self.request.get_tensor(port).data for port in self.compiled.outputs}

    def work(self, inputs: Arrays) -> Work:
        """Run the graph on its own inputs."""
        return Work(lambda: {name: values.copy() for name, values in self(inputs).items()})


class LanguageModel:
    """The language model's graph with its KV cache, buffers [1, heads, S, head_dim]."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.past = {p.get_any_name(): p for p in graph.compiled.inputs if p.get_any_name().startswith("past_")}
        visual = next(p for p in graph.compiled.inputs if p.get_any_name() == "visual_tokens").get_partial_shape()
        self.none = np.zeros((visual[0].get_length(), 2, visual[2].get_length()), np.float32)
        self.cache: dict[str, np.ndarray] = {}

    def prefill(self, inputs: Arrays) -> Work:
        """Run a whole prompt with its visual tokens from the graph's own inputs."""
        return self._prompt(inputs)

    def prefill_text(self, inputs: Arrays) -> Work:
        return self._prompt(self._text(inputs["input_ids"], 0))

    def decode(self, inputs: Arrays) -> Work:
        prefix, steps = inputs["prefix_ids"], inputs["step_ids"]
        length = prefix.shape[1]
        self._allocate(length + len(steps))
        self._step(self._text(prefix, 0), length)

        def timed() -> Arrays:
            logits = [self._step(self._text(ids[None], length + i), 1) for i, ids in enumerate(steps[:, None])]
            return {"logits": np.concatenate(logits)}

        return Work(timed, tokens=len(steps))

    def _prompt(self, feeds: Arrays) -> Work:
        length = feeds["input_ids"].shape[1]
        self._allocate(length)
        return Work(lambda: {"logits": self._step(feeds, length)[0]}, tokens=length)

    def _allocate(self, capacity: int) -> None:
        self.cache = {}
        for name, port in self.past.items():
            heads, size = (port.get_partial_shape()[axis].get_length() for axis in (1, 3))
            self.cache[name] = np.zeros((1, heads, capacity, size), np.float32)

    def _text(self, ids: np.ndarray, start: int) -> dict[str, np.ndarray]:
        """Return the graph's inputs for text ids [1, L] after `start` tokens."""
        length = ids.shape[1]
        positions = np.broadcast_to(np.arange(start, start + length), (3, 1, length))
        return {
            "input_ids": ids,
            "visual_index": np.zeros_like(ids),
            "visual_tokens": self.none,
            "positions": positions.copy(),
            "cache_position": np.array([start], np.int64),
            "output_index": np.array([[length - 1]], np.int64),
        }

    def _step(self, feeds: Arrays, length: int) -> np.ndarray:
        """Run L tokens after the cached ones and append their rows; return the logits [1, vocab] of the last."""
        outputs = self.graph({**feeds, **self.cache})
        start = int(feeds["cache_position"][0])
        for name, buffer in self.cache.items():
            buffer[:, :, start : start + length] = outputs[name.replace("past_", "new_", 1)]
        return outputs["logits"][0].copy()


def load(model: Model, precision: str, threads: int) -> Loaded:
    """See `protocol.serve`."""
    bundle = model.bundles.get("fp32" if precision == AUTO else precision)
    if bundle is None:
        raise PeerError(f"no bundle in {precision}; existing precisions: {', '.join(model.bundles) or 'none'}")
    graphs = {
        row: Graph(bundle / "graphs" / name / "primitive.onnx", precision, threads) for row, name in GRAPHS.items()
    }
    language_model = LanguageModel(graphs["prefill"])
    rows = {
        "vision": graphs["vision"].work,
        "prefill": language_model.prefill,
        "prefill_text": language_model.prefill_text,
        "decode": language_model.decode,
        "spatial": graphs["spatial"].work,
    }
    said = f"this project's {precision} graphs; {words(graphs['prefill'].compiled)}"
    return Loaded(rows, said, (ov.__name__,))


if __name__ == "__main__":
    serve(load)
