"""Every backend, best first: its packages, the variants it runs, its requirements, and how it opens a graph.

Packages are found by their metadata; none is imported unless it is installed and the GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import DECODE
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.device.cuda import Cuda, DeviceFacts
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host import packages
from bridge_stg.runtime.host.machine import cpu_flags
from bridge_stg.runtime.host.memory import gigabytes

if TYPE_CHECKING:  # they need numpy, and `doctor` lists backends where it is missing
    from bridge_stg.runtime.backends.session import Session
    from bridge_stg.runtime.backends.tensorrt.engine_cache import EngineEntry
    from bridge_stg.runtime.device.context import DeviceContext

STANDARD_SINCE = (1, 32)
"""First onnxruntime whose CPU kernels run the `standard` lowering: opset 24, in-place cache."""
STANDARD_SINCE_TENSORRT = (10, 15)
"""First TensorRT that parses the in-place cache of `standard`."""
BETWEEN_GRAPHS = ("visual_tokens", "feature_map", "taps")
"""Outputs that another graph reads, so they stay on the device."""
KERNELS = "kernels.bin"


@dataclass(frozen=True)
class Backend:
    """A backend that can run graphs.

    Attributes:
        name: its name for `--backend`.
        distributions: the packages that provide it, best first.
        extra: the pip extra that installs one.
        variants: returns the variants that a version can run, best first.
        open: opens one session: (bundle, graph, threads, device); without `device` the session opens its own.
        on_gpu: whether it needs a CUDA device.
        automatic: whether "auto" may choose it.
        problem: returns why it cannot run a graph here, or None: (bundle, graph, version, GPU).
    """

    name: str
    distributions: tuple[str, ...]
    extra: str
    variants: Callable[[tuple[int, ...]], tuple[str, ...]]
    open: Callable[..., Session]
    on_gpu: bool = False
    automatic: bool = True
    problem: Callable[[Bundle, GraphSpec, str, DeviceFacts], str | None] | None = None

    def version(self) -> str | None:
        """Return the version of the installed package; None if it is not installed."""
        return next(filter(None, map(packages.installed_version, self.distributions)), None)


def gpu() -> DeviceFacts:
    """Return the GPU's properties. Raises EngineError if it or cuda-python is missing."""
    return Cuda().facts()


def _open_onnxruntime(bundle: Bundle, graph: GraphSpec, threads: int | None) -> Session:
    from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession

    path, few = bundle.graph_path(graph.name, graph.variant), bundle.manifest.graphs[graph.name].get(DECODE)
    # Without these instructions onnxruntime multiplies weights in blocks as floats, many times slower.
    if few is None or graph.variant != "ort-cpu" or not {"avx2", "asimddp"} & set(cpu_flags()):
        return OnnxRuntimeSession(path, graph, threads=threads)
    return OnnxRuntimeSession(path, graph, threads=threads, few=(bundle.graph_path(few.name, few.variant), few))


def _open_provider(
    provider: str, bundle: Bundle, graph: GraphSpec, threads: int | None, device: DeviceContext | None = None
) -> Session:
    from bridge_stg.runtime.backends.onnxruntime_gpu import CUDA, OnnxRuntimeDeviceSession
    from bridge_stg.runtime.backends.tensorrt.engine_cache import engine_folders
    from bridge_stg.runtime.device.context import DeviceContext

    return OnnxRuntimeDeviceSession(
        bundle.graph_path(graph.name, graph.variant),
        graph,
        device or DeviceContext(),
        provider=provider,
        threads=threads,
        on_device=BETWEEN_GRAPHS,
        sizes=usual_sizes(bundle.manifest.spec),
        folder=None if provider == CUDA else engine_folders(bundle)[1] / provider,
    )


def _open_tensorrt(
    family: str, bundle: Bundle, graph: GraphSpec, threads: int | None, device: DeviceContext | None = None
) -> Session:
    from bridge_stg.runtime.backends.tensorrt.engine_cache import EngineDevice, find_engine
    from bridge_stg.runtime.backends.tensorrt.library import TensorRT
    from bridge_stg.runtime.backends.tensorrt.session import TensorRTSession
    from bridge_stg.runtime.device.context import DeviceContext

    library, device = TensorRT(family), device or DeviceContext()
    entry = find_engine(bundle, graph, EngineDevice(family, library.version, device.device.sm))
    kernels = Path(entry.folder) / KERNELS
    entry.check_plan()
    require_memory(entry, device)
    return TensorRTSession(entry.plan, graph, device, library, on_device=BETWEEN_GRAPHS, kernels=kernels)


def require_memory(entry: EngineEntry, device: DeviceContext) -> None:
    """Raise EngineError if an engine, its activations and one row of its KV cache do not fit the free memory.

    All engines of a chain share the memory of activations, so only what exceeds that of the others counts.
    """
    activations = max(map(int, entry.built.get("activation_bytes") or [0]))
    activations -= min(activations, 0 if device.scratch is None else device.scratch.size)
    row = int(entry.built.get("cache_row_bytes") or 0)
    free = device.free_bytes
    if free >= entry.size + activations + row:
        return
    needs = f"{gigabytes(entry.size)} for the engine, {gigabytes(activations)} for its activations"
    needs += f" and {gigabytes(row)} for a row of its KV cache" if row else ""
    advice = "Close other programs, or build it with a smaller --max-frames or from a bundle of lower precision"
    message = f"{entry.folder}: needs {needs}; {gigabytes(free)} of {device.device.name} are free. {advice}"
    raise EngineError("engine.out_of_memory", message)


def _without_engine(family: str, bundle: Bundle, graph: GraphSpec, version: str, device: DeviceFacts) -> str | None:
    from bridge_stg.runtime.backends.tensorrt.engine_cache import EngineDevice, find_engine

    try:
        find_engine(bundle, graph, EngineDevice(family, version, device.sm))
    except EngineError as error:
        return str(error)
    return None


def _lacks_precision(bundle: Bundle, graph: GraphSpec, version: str, device: DeviceFacts) -> str | None:
    precision = graph.precision.split()[0]
    if precision == "bf16":
        return f"{graph}: is bf16, which onnxruntime supports only in part; use TensorRT"
    if precision == "nvfp4":
        return f"{graph}: is nvfp4, for which onnxruntime has no operator; use TensorRT, or ort-cpu on the CPU"
    return None


def usual_sizes(spec: ModelSpec) -> dict[str, tuple[int, int, int]]:
    """Return the minimum, optimal and maximum size of every symbol of the chain, for providers that compile."""
    vision, frames, language = spec.vision, spec.frames, spec.language
    patch, side = vision.patch_size, vision.patch_size * vision.merge_size
    least = side * max(1, round(min(frames.coarse_min_pixels, frames.fine_min_pixels) ** 0.5 / side / 4))
    usual = side * max(1, round(frames.coarse_max_pixels**0.5 / side))
    most = side * max(2, round(2 * max(frames.coarse_max_pixels, frames.fine_max_pixels) ** 0.5 / side))
    cells = [least**2, usual**2, max(frames.coarse_max_pixels, frames.fine_max_pixels)]
    patches = tuple(max(vision.merge_size**2, count // patch**2) for count in cells)
    capacity = min(language.max_positions, 8192)
    return {
        "G": (1, min(4, frames.encoder_chunk_groups), frames.encoder_chunk_groups),
        "height": (least, usual, most), "width": (least, usual, most), "N": (patches[0], patches[1], patches[2]),
        "h": (least // patch, usual // patch, most // patch), "w": (least // patch, usual // patch, most // patch),
        "W": (1, patches[1], patches[2]),
        "B": (1, 1, 16), "L": (1, 16, 1024), "K": (1, 1, max(2, language.num_bridging_queries)),
        "V": (2, min(1024, capacity), capacity + 1), "S": (min(256, capacity), min(1024, capacity), capacity),
        "F": (1, min(32, frames.max_fine_frames), frames.max_fine_frames),
    }  # fmt: skip


BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="tensorrt",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        extra="tensorrt",
        variants=lambda v: ("standard", "primitive") if v >= STANDARD_SINCE_TENSORRT else ("primitive",),
        open=partial(_open_tensorrt, "tensorrt"),
        on_gpu=True,
        problem=partial(_without_engine, "tensorrt"),
    ),
    Backend(
        name="tensorrt-rtx",
        distributions=("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx"),
        extra="rtx",
        variants=lambda v: ("standard", "primitive"),
        open=partial(_open_tensorrt, "tensorrt_rtx"),
        on_gpu=True,
        problem=partial(_without_engine, "tensorrt_rtx"),
    ),
    Backend(
        name="onnxruntime-cuda",
        distributions=("onnxruntime-gpu",),
        extra="gpu",
        # `primitive` only has operators that old CUDA providers support.
        variants=lambda v: ("ort-cuda", "primitive", *(("standard",) if v >= STANDARD_SINCE else ())),
        open=partial(_open_provider, "CUDAExecutionProvider"),
        on_gpu=True,
        problem=_lacks_precision,
    ),
    # These two compile for minutes when a graph first runs, so they are never chosen automatically.
    Backend(
        name="onnxruntime-tensorrt",
        distributions=("onnxruntime-gpu",),
        extra="gpu",
        variants=lambda version: ("primitive",),
        open=partial(_open_provider, "TensorrtExecutionProvider"),
        on_gpu=True,
        automatic=False,
    ),
    Backend(
        name="onnxruntime-tensorrt-rtx",
        distributions=("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12"),
        extra="rtx-provider",
        variants=lambda version: ("primitive",),
        open=partial(_open_provider, "NvTensorRTRTXExecutionProvider"),
        on_gpu=True,
        automatic=False,
    ),
    Backend(
        name="onnxruntime",
        distributions=("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
        extra="cpu",
        # The last one is opened beside the first, or on request.
        variants=lambda v: ("ort-cpu", "standard", "primitive", DECODE) if v >= STANDARD_SINCE else ("primitive",),
        open=_open_onnxruntime,
    ),
)
"""The order in which "auto" tries them; it chooses the first that is ready for every graph."""
