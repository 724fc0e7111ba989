"""Serve free answers of llama.cpp as a runner: its multimodal library (mtmd), called as its tool llama-mtmd-cli does.

llama.cpp is compiled for this machine's instructions, and its own converter writes the GGUF files. The KV cache is f32
in fp32, otherwise f16, the default.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from built import built
from llama_cpp import mtmd_cpp as mtmd
from protocol import Arrays, Loaded, Model, PeerError, Work, serve

from benchmarks.speed.peers.run_llama_cpp import KINDS, WORDS, open_context

PRECISIONS = ("fp32", "int8")
HERE = Path(__file__).resolve().parent
BATCH = 2048  # llama-mtmd-cli's default


class Answers:
    """A model with its vision encoder."""

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        self.threads, self.f32_cache, self.context = threads, kind == "f32", None
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(folder / f"model-{kind}.gguf").encode(), parameters)
        vision = mtmd.mtmd_context_params_default()
        vision.n_threads = threads
        self.vision = mtmd.mtmd_init_from_file(str(folder / f"mmproj-{kind}.gguf").encode(), self.model, vision)
        if not self.vision:
            raise PeerError(f"llama.cpp cannot load {folder}; its output gives the reason")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def answer(self, inputs: Arrays) -> Work:
        prompt = str(inputs["prompt"]).replace("<image>", mtmd.mtmd_default_marker().decode())
        tokens = int(inputs["tokens"])
        chunks = self._chunks(prompt, inputs["images"])
        count = sum(
            mtmd.mtmd_input_chunk_get_n_tokens(mtmd.mtmd_input_chunks_get(chunks, i))
            for i in range(mtmd.mtmd_input_chunks_size(chunks))
        )
        mtmd.mtmd_input_chunks_free(chunks)
        self._open(count + tokens)

        def timed() -> Arrays:
            times, ids = [time.perf_counter()], []
            chunks, past = self._chunks(prompt, inputs["images"]), llama_cpp.llama_pos(0)
            failed = mtmd.mtmd_helper_eval_chunks(self.vision, self.context, chunks, 0, 0, BATCH, True, past)
            while not failed:
                ids.append(self._greedy())
                times.append(time.perf_counter())
                if len(ids) == tokens:
                    break
                batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(ids[-1]), 1)
                failed = llama_cpp.llama_decode(self.context, batch)
            mtmd.mtmd_input_chunks_free(chunks)
            if failed:
                raise PeerError(f"llama.cpp returned {failed} after {len(ids)} tokens")
            seconds = np.diff(times)
            return {"ids": np.array(ids), "first_s": seconds[0], "rest_s": seconds[1:].sum(), "prompt_tokens": count}

        return Work(timed, self._clear, tokens=tokens)

    def _chunks(self, prompt: str, images: np.ndarray) -> Any:
        """Return the prompt's chunks of text and images [N, height, width, 3]."""
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * len(images))()
        for i, image in enumerate(np.ascontiguousarray(images)):
            pixels = image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps[i] = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels)
        encoded = prompt.encode()
        text = mtmd.mtmd_input_text(encoded, len(encoded), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        failed = mtmd.mtmd_tokenize(self.vision, chunks, text, bitmaps, len(images))
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            raise PeerError(f"mtmd_tokenize returned {failed}")
        return chunks

    def _open(self, capacity: int) -> None:
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        self.context = open_context(self.model, capacity, batch=BATCH, threads=self.threads, f32_cache=self.f32_cache)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _greedy(self) -> int:
        """Return the id with the largest logit after the last token."""
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


def load(model: Model, precision: str, threads: int) -> Loaded:
    """See `protocol.serve`."""
    if precision not in PRECISIONS:
        raise PeerError(f"precision {precision}: this runner supports {', '.join(PRECISIONS)}")
    target = model.folder / "llama_cpp"
    build_s = built(target, lambda out: [str(HERE / "convert_gguf.py"), str(model.checkpoint), str(out)])
    llama_cpp.llama_backend_init()
    answers = Answers(target, KINDS[precision], threads)
    return Loaded({"answer": answers.answer}, WORDS[precision], ("llama-cpp-python",), build_s)


if __name__ == "__main__":
    serve(load)
