"""Run the language model on text with llama.cpp, compiled for this machine's instructions, teacher-forced.

The prompt is one batch, which llama.cpp splits by itself; logits are computed only for the last token. llama.cpp
chooses the attention kernel (flash attention if available). The cache is f32 in fp32, otherwise f16, the default.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from built import built
from convert.qwen3_folder import write_qwen3_folder
from protocol import Arrays, Loaded, Model, PeerError, Work, serve

KINDS = {"fp32": "f32", "int8": "q8_0", "int4": "q4_0"}
WORDS = {
    "fp32": "f32 weights, activations and cache",
    "int8": "q8_0 weights (blocks of 32), activations in int8 by block, f16 cache",
    "int4": "q4_0 weights (blocks of 32), activations in int8 by block, f16 cache",
}
HERE = Path(__file__).resolve().parent


class LanguageModel:
    """A model, and a context of the required capacity."""

    def __init__(self, path: Path, *, threads: int, f32_cache: bool) -> None:
        self.threads, self.f32_cache = threads, f32_cache
        self.context: Any = None
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )  # mapped into memory and repacked for this CPU, as by default
        if not self.model:
            raise PeerError(f"llama.cpp cannot load {path}; its output gives the reason")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def prefill(self, inputs: Arrays) -> Work:
        ids = inputs["input_ids"][0]
        self._open(len(ids) + 1)
        return Work(lambda: {"logits": self._append(ids)}, lambda: self._rewind(0), tokens=len(ids))

    def decode(self, inputs: Arrays) -> Work:
        prefix, steps = inputs["prefix_ids"][0], inputs["step_ids"]
        self._open(len(prefix) + len(steps) + 1)
        self._append(prefix)

        def timed() -> Arrays:
            return {"logits": np.stack([self._append(step) for step in steps[:, None]])}

        return Work(timed, lambda: self._rewind(len(prefix)), tokens=len(steps))

    def _open(self, capacity: int) -> None:
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        self.context = open_context(
            self.model, capacity, batch=capacity, threads=self.threads, f32_cache=self.f32_cache
        )

    def _rewind(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), 0, length, -1)

    def _append(self, ids: np.ndarray) -> np.ndarray:
        """Run ids [L] after the cached tokens; return the logits [vocab] of the last."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids.tolist())
        failed = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if failed:
            raise PeerError(f"llama_decode returned {failed}")
        logits = ctypes.cast(
            llama_cpp.llama_get_logits_ith(self.context, -1), ctypes.POINTER(ctypes.c_float * self.vocab)
        )
        return np.array(logits.contents, np.float32)


def open_context(model: Any, capacity: int, *, batch: int, threads: int, f32_cache: bool) -> Any:
    """Return a context of `capacity` tokens, at most `batch` of which are computed at once."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch = capacity, batch
    parameters.n_threads = parameters.n_threads_batch = threads
    if f32_cache:
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise PeerError(f"llama.cpp cannot create a context of {capacity} tokens; its output gives the reason")
    return context


def load(model: Model, precision: str, threads: int) -> Loaded:
    """See `protocol.serve`."""
    if precision not in KINDS:
        raise PeerError(f"precision {precision}: this runner supports {', '.join(KINDS)}")
    source = write_qwen3_folder(model.checkpoint, model.folder / "qwen3")
    kind = KINDS[precision]
    target = model.folder / f"llama_cpp-{kind}"
    build_s = built(target, lambda out: [str(HERE / "convert/gguf_file.py"), str(source), str(out), kind])
    llama_cpp.llama_backend_init()
    language_model = LanguageModel(target / "model.gguf", threads=threads, f32_cache=precision == "fp32")
    rows = {"prefill_text": language_model.prefill, "decode": language_model.decode}
    return Loaded(rows, WORDS[precision], ("llama-cpp-python",), build_s)


if __name__ == "__main__":
    serve(load)
