"""Read tensors of a .safetensors file as float32, one at a time, with only numpy (which lacks bf16)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and float32 values of each tensor. Raises KeyError for a dtype other than F32, F16 and BF16."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            stored = np.frombuffer(file.read(end - begin), STORED[entry["dtype"]])
            yield name, _float32(stored, entry["dtype"]).reshape(entry["shape"])


STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def _float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)  # bf16 is the upper half of a float32
    return stored.astype(np.float32)
