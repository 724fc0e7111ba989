"""Benchmark rows of a whole chain, independent of the engine that computes its graphs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.kv_pool import bucketed
from bridge_stg.runtime.backends.session import smallest
from bridge_stg.runtime.chain.decode import prefill_chunk
from bridge_stg.runtime.chain.vision_pass import coarse_tokens
from bridge_stg.runtime.grounder import Grounder
from speed.peers.protocol import Arrays, Work
from speed.watching import Watch, answer_marker


class ChainRows:
    """Benchmark rows of one grounder.

    Args:
        grounder: grounder to measure.
        sessions: the grounder's three sessions by graph.
    """

    def __init__(self, grounder: Grounder, sessions: dict[str, Any]) -> None:
        self.grounder, self.sessions, self.spec = grounder, sessions, grounder.spec
        encode = grounder.tokenizer.encode
        self.watch = Watch(sessions, marker=answer_marker(encode, self.spec.prompt.query))
        self._cache: Any = None
        self._cached: bytes | None = None

    def rows(self) -> dict[str, Callable[[Arrays], Work]]:
        """Return the function that prepares each row's work, by row."""
        return {
            "vision": self.vision,
            "prefill": self.prefill,
            "prefill_text": self.prefill,
            "decode": self.decode,
            "bridge": self.bridge,
            "spatial": self.spatial,
            "end_to_end": self.end_to_end,
            "queries": self.queries,
            "batch": self.batch,
        }

    def vision(self, inputs: Arrays) -> Work:
        """Encode coarse frames uint8 [G, P, h, w, 3] in the chain's own chunks."""

        def timed() -> Arrays:
            tokens = coarse_tokens(
                self.sessions["vision_encoder"], self.spec, inputs["frames"], report=lambda done, total: None
            )
            return {"visual_tokens": np.asarray(tokens)[:, 1:]}

        return Work(timed)

    def prefill(self, inputs: Arrays) -> Work:
        """Run the whole prompt in the chain's own chunks; outputs logits [vocab] of its last token."""
        length = inputs["input_ids"].shape[1]
        cache = self._room(length + 64)

        def timed() -> Arrays:
            self._cached = None
            return {"logits": self._run(cache, inputs, 0)["logits"][0, -1]}

        return Work(timed, tokens=length)

    def decode(self, inputs: Arrays) -> Work:
        """Feed given ids one by one after a text prefix; outputs logits [n, vocab]."""
        prefix, steps = inputs["prefix_ids"], inputs["step_ids"]
        length = prefix.shape[1]
        cache = self._room(length + 64)

        def timed() -> Arrays:
            found = [
                self._run(cache, {"input_ids": steps[None, i : i + 1]}, length + i)["logits"][0, -1]
                for i in range(len(steps))
            ]
            return {"logits": np.stack(found)}

        return Work(timed, before=lambda: self._prefix(cache, prefix), tokens=len(steps))

    def bridge(self, inputs: Arrays) -> Work:
        """Feed the bridging queries in one step after a text prefix; outputs taps [T, Q, H]."""
        prefix, ids = inputs["prefix_ids"], inputs["bridging_ids"]
        length = prefix.shape[1]
        cache = self._room(length + 64)

        def timed() -> Arrays:
            outputs = self._run(cache, {"input_ids": ids[None]}, length, outputs=len(ids))
            return {"taps": np.asarray(outputs["taps"])[:, 0]}

        return Work(timed, before=lambda: self._prefix(cache, prefix), tokens=len(ids))

    def spatial(self, inputs: Arrays) -> Work:
        """Run the spatial decoder once on given feature maps and taps."""
        return Work(lambda: {k: np.asarray(v) for k, v in self.sessions["spatial_decoder"].infer(dict(inputs)).items()})

    def end_to_end(self, inputs: Arrays) -> Work:
        """Ground one query on a video file, with a fixed answer."""
        return self._grounded(inputs, 1)

    def queries(self, inputs: Arrays) -> Work:
        """Ground `count` queries together on a video that is opened once."""
        return self._grounded(inputs, int(inputs["count"]))

    def batch(self, inputs: Arrays) -> Work:
        """Feed given ids [B, n] one by one to B rows after text prefixes [B, L]."""
        prefix, steps = inputs["prefix_ids"], inputs["step_ids"]
        rows, length = prefix.shape
        cache = self.sessions["language_model"].allocate_cache(batch=rows, capacity=bucketed(length + steps.shape[1]))
        self._run(cache, {"input_ids": prefix}, 0)

        def timed() -> Arrays:
            for i in range(steps.shape[1]):
                self._run(cache, {"input_ids": steps[:, i : i + 1]}, length + i)
            return {}

        return Work(timed, tokens=steps.size)

    def _grounded(self, inputs: Arrays, count: int) -> Work:
        clip, queries = str(inputs["clip"]), [str(query) for query in inputs["queries"][:count]]

        def timed() -> Arrays:
            self._cached = None
            self.watch.clear()
            self.watch.answer = inputs["answer_ids"].tolist()
            began = time.perf_counter()
            if count == 1:
                found = [self.grounder.ground(clip, queries[0], allow_none=False)]
            else:
                with self.grounder.open(clip) as video:
                    found = video.ground_many(queries, allow_none=False)
            total = time.perf_counter() - began
            self.watch.answer = None
            first = next((call.ended for call in self.watch.calls if call.answers), began)
            language = [call for call in self.watch.calls if call.graph == "language_model"]
            details = {
                "total": total,
                "first_token": first - began,
                "timings": dict(found[0].timings),
                "graphs": self.watch.seconds(),
                "calls": {name: sum(c.graph == name for c in self.watch.calls) for name in self.sessions},
                "language_steps": sum(call.began >= first for call in language),
                "answer": found[0].answer,
                "tokens": dict(found[0].tokens),
            }
            assert found[0].boxes is not None
            boxes = found[0].boxes
            return {"boxes": boxes.boxes, "times": boxes.times, "details": np.array(json.dumps(details))}

        return Work(timed)

    def _prefix(self, cache: Any, ids: np.ndarray) -> None:
        """Prefill the cache with these ids unless it already contains them; later steps do not change them."""
        if self._cached != ids.tobytes():
            self._run(cache, {"input_ids": ids}, 0)
            self._cached = ids.tobytes()

    def _room(self, positions: int) -> Any:
        """Return a cache of one row with the capacity that the chain would choose."""
        capacity = bucketed(positions)
        if self._cache is None or self._cache.capacity != capacity:
            self._cached = None
            self._cache = self.sessions["language_model"].allocate_cache(batch=1, capacity=capacity)
        return self._cache

    def _run(self, cache: Any, inputs: Arrays, past: int, *, outputs: int = 1) -> dict[str, Any]:
        """Feed ids [B, L] in chunks after `past` cached tokens; as text unless visual inputs are given."""
        ids, width = inputs["input_ids"], self.spec.language.hidden_size
        rows, length = ids.shape
        text = np.broadcast_to(past + np.arange(length, dtype=np.int64), (3, rows, length))
        nothing = np.zeros((1 + self.spec.vision.deepstack_levels, 2, width), np.float32)
        visual_tokens = inputs.get("visual_tokens", nothing)
        index, positions = inputs.get("visual_index", np.zeros_like(ids)), inputs.get("positions", text)
        found: dict[str, Any] = {}
        chunk, unread = prefill_chunk(self.sessions["language_model"]), smallest(self.sessions["language_model"], "K")
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            read = outputs if stop == length else unread
            feeds = {
                "input_ids": np.ascontiguousarray(ids[:, start:stop]),
                "visual_index": np.ascontiguousarray(index[:, start:stop]),
                "visual_tokens": visual_tokens,
                "positions": np.ascontiguousarray(positions[:, :, start:stop]),
                "cache_position": np.full(rows, past + start, np.int64),
                "output_index": np.tile(np.arange(stop - start - read, stop - start, dtype=np.int64), (rows, 1)),
            }
            found = self.sessions["language_model"].infer(feeds, cache=cache)
        return found
