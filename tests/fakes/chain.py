"""A chain without weights: sessions in numpy whose outputs depend on the same inputs as those of the real graphs.

The language model's logits and taps are random numbers seeded by the sequence that a position sees: a token too many, a
wrong position or a stale cache entry changes them. A script can give it the answer to a query.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import Preferences
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.spec import FramesSpec, LanguageSpec, ModelSpec, PromptSpec, TextSpec, VisionSpec
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.grounder import Grounder

VOCAB, BRIDGING, TAPS, WIDTH = 256, 3, 2, 8
PIECES = re.compile(r"<\|[a-z_]+\|>|.", re.DOTALL)


class FakeTokenizer:
    """Tokenizer with one id per character and per special token."""

    def __init__(self) -> None:
        self.special: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [
            ord(piece) if len(piece) == 1 else self.special.setdefault(piece, 200 + len(self.special))
            for piece in PIECES.findall(text)
        ]

    def to_json(self) -> str:
        """Return a tokenizer.json with the same ids of ASCII characters and special tokens."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        letters = {i: chr(i) if 33 <= i < 127 else chr(256 + min(i, 33)) for i in range(128)}
        made = Tokenizer(models.BPE({letter: i for i, letter in letters.items()}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        return made.to_str()

    def decode(self, ids: Sequence[int]) -> str:
        names = {value: key for key, value in self.special.items()}
        return "".join(names.get(i) or (chr(i) if i < 200 else f"[{i}]") for i in map(int, ids))


class FakeCache:
    """Cache of the inputs instead of keys and values: id, digest of the visual row, three positions."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.entries = np.zeros((batch, capacity, 5), np.int64)

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes

    def copy_prefix(self, source: FakeCache, length: int) -> None:
        assert source.batch == 1
        self.entries[:, :length] = source.entries[:, :length]


class FakeSession:
    """Session that records its calls, and runs `before`, which may raise or wait, before each call."""

    device = None

    def __init__(self) -> None:
        self.graph = GraphSpec("fake", "fake", inputs=(), outputs=(), opset=0)
        self.preferences = Preferences()
        self.calls: list[dict[str, np.ndarray]] = []
        self.closed = False
        self.before: Any = lambda feeds: None

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: Any = None) -> dict[str, np.ndarray]:
        if self.closed:
            raise EngineError("engine.closed", "this session is closed")
        self.before(feeds)
        self.calls.append(dict(feeds))
        return self.run(feeds, cache)

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any) -> dict[str, np.ndarray]:
        raise AssertionError

    def close(self) -> None:
        self.closed = True


class FakeVisionEncoder(FakeSession):
    """Vision encoder whose visual tokens and feature map are mean colours of merged cells and of patches."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.vision = spec.vision

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any) -> dict[str, np.ndarray]:
        frames, patch, merge = feeds["frames"], self.vision.patch_size, self.vision.merge_size
        assert frames.dtype == np.uint8 and frames.flags.c_contiguous
        groups, _, height, width, _ = frames.shape
        assert len(feeds["pos_index"]) == (height // patch) * (width // patch)
        cells = frames.mean(axis=1).reshape(groups, height // patch, patch, width // patch, patch, 3).mean((2, 4)) / 255
        merged = cells.reshape(groups, cells.shape[1] // merge, merge, cells.shape[2] // merge, merge, 3).mean((2, 4))
        tokens = np.zeros((1 + self.vision.deepstack_levels, merged.size // 3, WIDTH), np.float32)
        tokens[..., :3] = merged.reshape(-1, 3) + 1
        return {"visual_tokens": tokens, "feature_map": cells.astype(np.float32)}


class FakeLanguageModel(FakeSession):
    """Language model that gives the scripted answer to a query, or otherwise random tokens."""

    def __init__(self, tokenizer: FakeTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.script: dict[str, str] = {}
        self.replies: dict[str, str] = {}  # text that the user's turn contains → the reply as text
        self.seen: list[list[str]] = []
        self.allocated: list[FakeCache] = []
        self.lock = threading.Lock()

    def allocate_cache(self, *, batch: int, capacity: int) -> FakeCache:
        cache = FakeCache(batch, capacity)
        self.allocated.append(cache)
        return cache

    def run(self, feeds: Mapping[str, np.ndarray], cache: FakeCache) -> dict[str, np.ndarray]:
        ids, start, output = feeds["input_ids"], feeds["cache_position"], feeds["output_index"]
        visual, positions = feeds["visual_tokens"], feeds["positions"]
        batch, new = ids.shape
        assert all(array.dtype == np.int64 for array in (ids, start, output, positions, feeds["visual_index"]))
        assert positions.shape == (3, batch, new) and output.shape[0] == batch == cache.batch
        assert ((output >= 0) & (output < new)).all() and (start + new <= cache.capacity).all()
        assert not visual[:, 0].any() and feeds["visual_index"].max() < visual.shape[1]
        logits = np.zeros((batch, output.shape[1], VOCAB), np.float32)
        taps = np.zeros((TAPS, batch, output.shape[1], WIDTH), np.float32)
        seen = []
        for b in range(batch):
            rows = visual[:, feeds["visual_index"][b]].sum((0, 2)) * 1e4
            fed = np.stack([ids[b], rows.astype(np.int64), *positions[:, b]], axis=-1)
            cache.entries[b, start[b] : start[b] + new] = fed
            for k, index in enumerate(output[b]):
                visible = cache.entries[b, : start[b] + index + 1]
                random = np.random.default_rng(np.frombuffer(visible.tobytes(), np.uint32))
                taps[:, b, k] = random.random((TAPS, WIDTH))
                logits[b, k] = random.normal(size=VOCAB)
                logits[b, k] += self.scripted(visible)
            seen.append(self.tokenizer.decode(cache.entries[b, : start[b] + output[b, -1] + 1, 0]))
        with self.lock:
            self.seen.append(seen)
        return {"logits": logits, "taps": taps}

    def scripted(self, visible: np.ndarray) -> np.ndarray:
        wish = np.zeros(VOCAB, np.float32)
        text = self.tokenizer.decode(visible[:, 0])
        for query, answer in self.script.items():
            _, found, written = text.rpartition(f"Find {query}.<|im_end|>\n<|im_start|>assistant\n")
            if found and answer.startswith(written) and written != answer:
                wish[self.tokenizer.encode(answer[len(written) :])[0]] = 50
        turn, _, written = text.rpartition("<|im_end|>\n<|im_start|>assistant\n")
        for part, reply in self.replies.items():
            if part in turn and f"{reply}<|im_end|>".startswith(written):
                wish[self.tokenizer.encode(f"{reply}<|im_end|>"[len(written) :])[0]] = 50
                break
        return wish


class FakeSpatialDecoder(FakeSession):
    """Spatial decoder: presence is a frame's mean red; a box depends on taps, its frame and the row's other frames."""

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any) -> dict[str, np.ndarray]:
        features, taps, mask = feeds["feature_map"], feeds["taps"], feeds["frame_mask"]
        assert feeds["frame_times"].dtype == np.float32 and mask.dtype == bool and mask.any(axis=1).all()
        assert taps.shape[:3:2] == (TAPS, BRIDGING) and mask.shape == (taps.shape[1], len(features))
        colour = features.mean((1, 2))  # [F, 3]
        query = taps.mean((0, 2, 3))  # [B]
        others = np.stack([colour[row, 1].mean() for row in mask])
        x = 0.25 + 0.4 * query[:, None] + 0.1 * others[:, None] + 0 * colour[None, :, 0]
        y = np.broadcast_to(0.2 + 0.6 * colour[None, :, 2], x.shape)
        size = np.full_like(x, 0.2)
        boxes = np.stack([x, y, size, size * 2], axis=-1).astype(np.float32)
        presence = np.broadcast_to(colour[None, :, 0], x.shape).astype(np.float32)
        return {"boxes": boxes, "presence": presence}


def text_spec(family: str = "qwen3_vl", heads: str = "text", **frames: Any) -> ModelSpec:
    """Return the spec of a small model with text heads, whose prompt is that of a family."""
    spec = fake_spec(**frames)
    end = FakeTokenizer().encode("<|im_end|>")
    text = TextSpec(tube="Boxes of {query}?", span="When is {query}?", image="Where is {query}?", stop_ids=tuple(end))
    prompt = PromptSpec(head="<|im_start|>user\n<|vision_start|>")
    vision = spec.vision
    if family == "qwen2_5_vl":
        prompt = dataclasses.replace(prompt, prints_times=False)
        text = dataclasses.replace(text, box_scale=0)
        vision = dataclasses.replace(vision, family=family, tokens_per_second=2.0)
    language = dataclasses.replace(spec.language, num_bridging_queries=0, tapped_layers=())
    language = spec.language if heads == "bridge" else language
    return ModelSpec(vision, language, spec.frames, prompt, spec.span, heads=heads, text=text)


def fake_spec(**frames: Any) -> ModelSpec:
    """Return the spec of a small model: 2 coarse samples per second in groups of 2, 4 fine frames per second."""
    return ModelSpec(
        vision=VisionSpec(
            family="qwen3_vl",
            patch_size=8,
            merge_size=2,
            temporal_patch_size=2,
            hidden_size=16,
            head_dim=8,
            deepstack_levels=1,
            position_grid=4,
        ),
        language=LanguageSpec(
            hidden_size=WIDTH,
            num_layers=1,
            kv_heads=1,
            head_dim=4,
            vocab_size=VOCAB,
            max_positions=4096,
            num_bridging_queries=BRIDGING,
            tapped_layers=(0, 0),
        ),
        frames=FramesSpec(
            **{
                "coarse_max_pixels": 32 * 32,
                "fine_max_pixels": 64 * 64,
                "coarse_min_pixels": 16 * 16,
                "fine_min_pixels": 16 * 16,
                "encoder_chunk_groups": 3,
                **frames,
            }
        ),
    )


def fake_grounder(
    spec: ModelSpec | None = None,
    script: Mapping[str, str] | None = None,
    replies: Mapping[str, str] | None = None,
    **options: Any,
) -> Grounder:
    """Return a Grounder over fake sessions; see `Grounder.sessions`, `FakeLanguageModel.script` and `.replies`."""
    spec = spec or fake_spec()
    tokenizer: Any = FakeTokenizer()
    tokenizer.encode("<|im_end|>")  # the id of `text_spec`
    language = FakeLanguageModel(tokenizer)
    language.script, language.replies = dict(script or {}), dict(replies or {})
    sessions: dict[str, Any] = {
        "vision_encoder": FakeVisionEncoder(spec),
        "language_model": language,
        "spatial_decoder": FakeSpatialDecoder(),
    }
    return Grounder(sessions, spec, tokenizer, **options)


def clip(
    seconds: float = 8.0,
    *,
    fps: float = 8.0,
    present: tuple[float, float] = (2.0, 5.0),
    size: tuple[int, int] = (48, 64),
):
    """Return (time, RGB frame) pairs: red while the target is present, bluer with time, some green noise."""
    random = np.random.default_rng(0)
    frames = []
    for i in range(int(seconds * fps)):
        time = i / fps
        frame = np.zeros((*size, 3), np.uint8)
        frame[..., 0] = 230 if present[0] <= time < present[1] else 20
        frame[..., 1] = random.integers(0, 255)
        frame[..., 2] = 200 * time / seconds
        frames.append((time, frame))
    return frames
