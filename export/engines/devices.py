"""The devices of estimates by name: those of `runtime.device.table`, and this machine's processor, measured."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bridge_stg.runtime.device.table import DEVICES, GB, PEAKS, Device
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.cpus import usable_cpus
from bridge_stg.runtime.host.machine import machine

CPU = "cpu"
"""Name of the device that is measured when it is requested: this machine's processor."""
BUFFER_BYTES = 2**28
"""Bytes read by the bandwidth test, more than the last-level cache of common processors."""
VNNI_GAIN, INT8_GAIN = 3.6, 2.0
"""Peak of int8 over fp32 matmuls in onnxruntime, with and without VNNI (docs/performance.md)."""


def find_device(name: str) -> Device:
    """Return the device of a name, measuring it if it is `cpu`; raise EngineError if it is unknown."""
    if name == CPU:
        return this_cpu()
    found = next((device for device in DEVICES if device.name == name), None)
    if found is None:
        known = ", ".join(device.name for device in DEVICES)
        raise EngineError("options.invalid", f"target {name!r} is unknown; known: {CPU}, {known}")
    return found


def device_table() -> str:
    """Return the table as text."""
    rows: list[tuple[str, ...]] = [("target", "device", "SM", "memory", "for models", "GB/s", *PEAKS)]
    for device in DEVICES:
        sizes = (f"{device.memory / GB:.1f} GB", f"{device.usable / GB:.1f} GB", f"{device.bandwidth / 1e9:.0f}")
        peaks = (f"{device.peaks[name] / 1e12:.1f}" if name in device.peaks else "–" for name in PEAKS)
        rows.append((device.name, device.title, str(device.sm), *sizes, *peaks))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"{CPU:{widths[0]}}  this machine, measured", "Peaks in T operations per second."])


def this_cpu() -> Device:
    """Measure this machine's processor: bandwidth and fp32 peak in about a second, int8 by the processor's flags."""
    threads, found = usable_cpus(), machine()
    fp32 = matmul_peak()
    gain = VNNI_GAIN if {"avx512_vnni", "avx_vnni"} & set(found.cpu_flags) else INT8_GAIN
    total, available = found.memory.total or 0, found.memory.available or 0
    peaks = {"fp32": fp32, "fp16": fp32, "int8": gain * fp32}
    return Device(CPU, f"{found.cpu}, {threads} threads", total, total - available, bandwidth(threads), peaks)


def bandwidth(threads: int, *, buffer_bytes: int = BUFFER_BYTES, repeats: int = 5) -> float:
    """Return the bytes per second that `threads` threads read from memory together, best of several passes.

    The buffer is read by numpy's maximum and by its dot product, which write nothing; the faster one counts.
    """
    buffer = np.ones(buffer_bytes // 4, np.float32)
    parts = np.array_split(buffer, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for read in (np.max, _dot):
            for _ in range(repeats):
                began = time.perf_counter()
                list(pool.map(read, parts))
                best = max(best, buffer.nbytes / (time.perf_counter() - began))
    return best


def _dot(part: np.ndarray) -> float:
    return float(np.dot(part, part))


def matmul_peak(*, rows: int = 512, inputs: int = 1024, outputs: int = 4096, repeats: int = 8) -> float:
    """Return the operations per second of an fp32 matmul in numpy with its own threads, best of several runs."""
    left, right = np.ones((rows, inputs), np.float32), np.ones((inputs, outputs), np.float32)
    best = 0.0
    for _ in range(repeats + 1):
        began = time.perf_counter()
        left @ right
        best = max(best, 2.0 * rows * inputs * outputs / (time.perf_counter() - began))
    return best
