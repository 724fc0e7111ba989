"""The table of devices that estimates know: memory, bandwidth, peak operations per second, and their sources.

Peaks are dense (without sparsity) and of the GPU alone; those of a Jetson's DLA are left out, since no graph of this
project runs there. bf16 has the rate of fp16, with fp32 sums. Weight-only precisions (int4) compute in fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GB, GIB = 10**9, 2**30
JETSON_KEPT = int(1.5e9)
"""Bytes of a Jetson's memory that no model gets: regions of the firmware, Ubuntu without a desktop, CUDA libraries.

An Orin Nano of 8 GiB shows 7607 MiB, of which 520 MiB are in use before a program starts:
https://github.com/hokwangchoi/jetson-orin-nano-benchmarks (vlm-benchmarks/assets/results/tegrastats).
"""
GPU_KEPT = GB
"""The same for a GPU with its own memory: the CUDA context, the libraries' workspaces, a display."""
PEAKS = ("fp32", "fp16", "int8", "fp8", "fp4")
"""Keys of `Device.peaks`."""


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
GPUS: Mapping[str, Device] = {device.name: device for device in DEVICES if device.kind == "gpu"}
"""Devices with a memory of their own, on which a model can be trained."""
