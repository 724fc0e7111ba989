"""The table of devices that the estimator knows: memory, bandwidth, peak operations per second, and their sources.

Peaks are dense (without sparsity) and of the GPU alone; those of a Jetson's DLA are left out, since no graph of this
project runs there. bf16 has the rate of fp16. Weight-only precisions (int4) compute in fp16.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.cpus import usable_cpus
from bridge_stg.runtime.host.machine import machine

GB, GIB = 10**9, 2**30
CPU = "cpu"
"""Name of the device that is measured when it is requested: this machine's processor."""
JETSON_KEPT = int(1.5e9)
"""Bytes of a Jetson's memory that no model gets: regions of the firmware, Ubuntu without a desktop, CUDA libraries.

An Orin Nano of 8 GiB shows 7607 MiB, of which 520 MiB are in use before a program starts:
https://github.com/hokwangchoi/jetson-orin-nano-benchmarks (vlm-benchmarks/assets/results/tegrastats).
"""
GPU_KEPT = GB
"""The same for a GPU with its own memory: the CUDA context, the libraries' workspaces, a display."""
PEAKS = ("fp32", "fp16", "int8", "fp8", "fp4")
"""Keys of `Device.peaks`."""
BUFFER_BYTES = 2**28
"""Bytes read by the bandwidth test, more than the last-level cache of common processors."""
VNNI_GAIN, INT8_GAIN = 3.6, 2.0
"""Peak of int8 over fp32 matmuls in onnxruntime, with and without VNNI (docs/performance.md)."""


@dataclass(frozen=True)
class Device:
    """One row of the table.

    Attributes:
        name: value of `--target`.
        title: name for people.
        memory: bytes of memory that the device has; a Jetson shares them with the host.
        kept: bytes of it that the system keeps.
        bandwidth: peak bytes per second between memory and processor.
        peaks: precision of a matmul's inputs → peak operations per second; a missing precision is not supported.
        sm: compute capability, 87 for 8.7; None: a processor.
    """

    name: str
    title: str
    memory: int
    kept: int
    bandwidth: float
    peaks: Mapping[str, float]
    sm: int | None = None

    @property
    def usable(self) -> int:
        """Bytes for weights, KV cache and activations."""
        return self.memory - self.kept

    @property
    def kind(self) -> str:
        """`jetson` if the GPU shares the host's memory, else `gpu` or `cpu`."""
        if self.sm is None:
            return "cpu"
        return "jetson" if self.kept == JETSON_KEPT else "gpu"


def _orin(name: str, title: str, gib: int, *, cores: int, mhz: int, bandwidth: float) -> Device:
    """Return an Orin module.

    An Ampere core of an Orin has 2 fp32 operations per cycle, and its share of a tensor core 16 in fp16 and 32 in int8.
    With these, all modules have the published TOPS after doubling for sparsity and adding the DLA's.
    """
    rate = cores * mhz * 1e6
    peaks = {"fp32": 2 * rate, "fp16": 16 * rate, "int8": 32 * rate}
    return Device(name, title, gib * GIB, JETSON_KEPT, bandwidth, peaks, 87)


def _gpu(name: str, title: str, memory: int, bandwidth: float, sm: int, **tera: float) -> Device:
    peaks = {precision: value * 1e12 for precision, value in tera.items()}
    return Device(name, title, memory, GPU_KEPT, bandwidth * 1e9, peaks, sm)


# Cores, clocks and bandwidths of Orin: https://developer.nvidia.com/embedded/jetson-modules, of the Super modes:
# https://developer.nvidia.com/blog/nvidia-jetpack-6-2-brings-super-mode-to-nvidia-jetson-orin-nano-and-jetson-orin-nx-modules/
# GPU and DLA apart: https://github.com/NVIDIA/Deep-Learning-Accelerator-SW (171 of 275 sparse TOPS are the GPU's).
# Thor: https://developer.nvidia.com/embedded/jetson-modules (2070 sparse FP4 TFLOPS, 2560 cores at 1.57 GHz); dense FP4
# is half of it, FP8 and int8 a quarter, fp16 an eighth (https://huggingface.co/hardware/jetson-t5000: 258.5).
# GeForce, with fp32 sums, as the engines have them: the architecture whitepapers of Ampere GA102, Ada and RTX Blackwell
# (https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, appendix A,
# https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf, appendix A);
# RTX 3060 and 4060 follow from their cores and boost clocks (https://www.nvidia.com/en-us/geforce/graphics-cards/).
# L4, A10, A100, H100, H200: the data sheets at https://www.nvidia.com/en-us/data-center/ (halved where with sparsity).
DEVICES: tuple[Device, ...] = (
    _orin("orin-nano-4g", "Jetson Orin Nano 4 GB", 4, cores=512, mhz=625, bandwidth=34e9),
    _orin("orin-nano-4g-super", "Jetson Orin Nano 4 GB, MAXN SUPER", 4, cores=512, mhz=1020, bandwidth=51e9),
    _orin("orin-nano-8g", "Jetson Orin Nano 8 GB", 8, cores=1024, mhz=625, bandwidth=68e9),
    _orin("orin-nano-8g-super", "Jetson Orin Nano 8 GB, MAXN SUPER", 8, cores=1024, mhz=1020, bandwidth=102e9),
    _orin("orin-nx-8g", "Jetson Orin NX 8 GB", 8, cores=1024, mhz=765, bandwidth=102.4e9),
    _orin("orin-nx-8g-super", "Jetson Orin NX 8 GB, MAXN SUPER", 8, cores=1024, mhz=1173, bandwidth=102.4e9),
    _orin("orin-nx-16g", "Jetson Orin NX 16 GB", 16, cores=1024, mhz=918, bandwidth=102.4e9),
    _orin("orin-nx-16g-super", "Jetson Orin NX 16 GB, MAXN SUPER", 16, cores=1024, mhz=1173, bandwidth=102.4e9),
    _orin("agx-orin-32g", "Jetson AGX Orin 32 GB", 32, cores=1792, mhz=930, bandwidth=204.8e9),
    _orin("agx-orin-64g", "Jetson AGX Orin 64 GB", 64, cores=2048, mhz=1300, bandwidth=204.8e9),
    Device(
        "agx-thor", "Jetson AGX Thor 128 GB", 128 * GIB, JETSON_KEPT, 273e9,
        {"fp32": 8.06e12, "fp16": 258.5e12, "int8": 517e12, "fp8": 517e12, "fp4": 1035e12}, 110,
    ),
    _gpu("rtx3060", "GeForce RTX 3060 12 GB", 12 * GIB, 360, 86, fp32=12.7, fp16=25.5, int8=102),
    _gpu("rtx4060", "GeForce RTX 4060 8 GB", 8 * GIB, 272, 89, fp32=15.1, fp16=30.2, int8=121, fp8=60.5),
    _gpu("rtx4090", "GeForce RTX 4090 24 GB", 24 * GIB, 1008, 89, fp32=82.6, fp16=165.2, int8=660.6, fp8=330.3),
    _gpu(
        "rtx5090", "GeForce RTX 5090 32 GB", 32 * GIB, 1792, 120,
        fp32=104.8, fp16=209.5, int8=838, fp8=419, fp4=1676,
    ),
    _gpu("l4", "L4 24 GB", 24 * GB, 300, 89, fp32=30.3, fp16=121, int8=242, fp8=242),
    _gpu("a10", "A10 24 GB", 24 * GB, 600, 86, fp32=31.2, fp16=125, int8=250),
    _gpu("a100-80g", "A100 SXM 80 GB", 80 * GB, 2039, 80, fp32=19.5, fp16=312, int8=624),
    _gpu("h100-80g", "H100 SXM 80 GB", 80 * GB, 3350, 90, fp32=67, fp16=989, int8=1979, fp8=1979),
    _gpu("h200", "H200 SXM 141 GB", 141 * GB, 4800, 90, fp32=67, fp16=989, int8=1979, fp8=1979),
)  # fmt: skip


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
