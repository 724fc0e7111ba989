"""Steps of the GPU check, one per process: device code alone, and the chain on one backend.

Usage: python -m benchmarks.gpu.steps STEP [BUNDLE BACKEND] --out FILE.json [--pretend]. Writes {"status", "figures"};
without that file the step has failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.gpu.chain import NATIVE, LeftOut, chain
from bridge_stg.runtime.backends.tensorrt.cuda_graphs import PreparedCall, StepGraphs
from bridge_stg.runtime.device import array_ops
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.video.frame import resize

PACKAGES = (
    "numpy", "av", "torch", "cuda-bindings", "cupy-cuda12x", "cupy-cuda13x", "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu13-bindings",
)  # fmt: skip
SIZES = (((48, 64), (32, 32)), ((37, 53), (64, 96)), ((720, 1280), (192, 320)), ((1080, 1920), (448, 800)))
MEGABYTES = 64
REPEATS, PRETENDED_REPEATS = 20, 1
ROUNDS = 10


def equal(found: Any, expected: np.ndarray, what: str) -> None:
    """Raise AssertionError unless two arrays have the same bytes."""
    found = np.asarray(found)
    same = found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
    assert same, f"{what}: {found.dtype} {found.shape} differs from {expected.dtype} {expected.shape}, or its values do"


def seconds(work: Callable[[], object], context: DeviceContext) -> float:
    """Return the seconds of one call, measured over several that wait for the device once."""
    repeats = REPEATS if on_device(context) else PRETENDED_REPEATS
    work()
    context.cuda("cudaDeviceSynchronize")
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    context.cuda("cudaDeviceSynchronize")
    return (time.perf_counter() - begun) / repeats


def on_device(context: DeviceContext) -> bool:
    """Return whether CUDA is the real one, not the stand-in."""
    return isinstance(context.cuda.api, ModuleType)


def device(context: DeviceContext) -> dict[str, Any]:
    """The device's properties, its memory, and the versions of what is installed."""
    _, free, total = context.cuda.api.cudaMemGetInfo()
    return {**asdict(context.device), "free_bytes": free, "total_bytes": total, **describe(*PACKAGES)}


def arrays(context: DeviceContext) -> dict[str, Any]:
    """Arrays of every dtype come back unchanged, through views, copies between strides, joins and reused memory."""
    random = np.random.default_rng(0)
    for dtype in ("uint8", "int8", "float16", "float32", "int32", "int64", "bool"):
        for shape in ((7,), (3, 5, 11), (2, 1, 33, 4), (0, 3)):
            value = random.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
            array = context.upload(value)
            equal(array.numpy(), value, f"upload of {dtype}")
            equal(array.copy().numpy(), value, f"copy of {dtype}")
            equal(array_ops.stack([array, array], axis=1).numpy(), np.stack([value, value], axis=1), "stack")
    value = random.normal(size=(6, 40, 50)).astype(np.float32)
    array = context.upload(value)
    equal(array[1:4, 3:30, 7:].numpy(), value[1:4, 3:30, 7:], "view")
    array[2:4, 5:9, 10:20] = context.upload(value[:2, :4, :10].copy())
    value[2:4, 5:9, 10:20] = value[:2, :4, :10]
    equal(array.numpy(), value, "assignment to a view")
    equal(array_ops.join([array, array], axis=1, zeros_before=2).numpy(),
          np.concatenate([np.zeros((6, 2, 50), np.float32), value, value], axis=1), "join")  # fmt: skip
    kept = [(context.upload(np.full((333,), i, np.int32)).copy(), i) for i in range(200)]
    for made, i in kept[::2]:
        equal(made.numpy(), np.full((333,), i, np.int32), "reused memory")
    large = np.zeros(MEGABYTES << 20, np.uint8)
    there = context.upload(large)
    to_device = seconds(lambda: there.write(large), context)
    to_host = seconds(there.numpy, context)
    within = seconds(there.copy, context)
    names = {"to_device": to_device, "to_host": to_host, "within_device": within}
    return {f"{name}_gb_per_s": round(large.nbytes / spent / 1e9, 2) for name, spent in names.items()}


def resizing(context: DeviceContext) -> dict[str, Any]:
    """Frames are resized on the device, to the bytes of Pillow."""
    assert context.resizer.compiled, "the kernel was not compiled: frames would be resized on the host"
    random, figures = np.random.default_rng(0), {}
    for size, target in SIZES:
        picture = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        there = context.upload(picture)
        equal(resize(there, target).numpy(), resize(picture, target), f"{size} to {target}")
        begun = time.perf_counter()
        resize(picture, target)
        on_host = time.perf_counter() - begun
        on_device = seconds(lambda there=there, target=target: resize(there, target), context)
        figures[f"{size[1]}x{size[0]} to {target[1]}x{target[0]}"] = {"device_s": on_device, "host_s": on_host}
    return figures


def streams(context: DeviceContext) -> dict[str, Any]:
    """Work on one stream sees what another stream wrote before the event that it waits for."""
    cuda, other = context.cuda, context.uploads
    large = context.empty((MEGABYTES << 20,), np.uint8)
    target = context.empty(large.shape, np.uint8)
    for value in range(1, ROUNDS + 1):
        with context.lock:
            for _ in range(4):  # long work before it, so that a missing wait would be seen
                cuda("cudaMemsetAsync", large.address, 0, large.nbytes, other)
            cuda("cudaMemsetAsync", large.address, value, large.nbytes, other)
            ready = cuda.event()
            cuda("cudaEventRecord", ready, other)
            cuda("cudaStreamWaitEvent", context.stream, ready, 0)
            cuda.copy(target.address, large.address, large.nbytes, cuda.on_device, context.stream)
            done = cuda.event()
            cuda("cudaEventRecord", done, context.stream)
            cuda("cudaStreamWaitEvent", other, done, 0)
        found = target.numpy()
        assert (found == value).all(), f"round {value}: the copy ran before the event of the other stream"
        for event in (ready, done):
            cuda("cudaEventDestroy", event)
    return {"rounds": ROUNDS}


def graphs(context: DeviceContext) -> dict[str, Any]:
    """A captured step reads its inputs anew at each launch, and costs one call."""
    cuda, steps = context.cuda, StepGraphs(context)
    source, target = context.zeros((1 << 16,), np.float32), context.empty((1 << 16,), np.float32)
    piece = source.nbytes // 64

    def execute(stream: int) -> None:
        for at in range(0, source.nbytes, piece):
            cuda.copy(target.address + at, source.address + at, piece, cuda.on_device, stream)

    call = PreparedCall(execute, lambda stream: True, {"target": target}, (source, target))
    with context.lock:
        steps.run_and_capture("step", call)
    assert steps.capture_error is None and len(steps) == 1, f"not captured: {steps.capture_error}"
    for value in range(5):
        source.write(np.full(source.shape, value, np.float32))
        with context.lock:
            outputs = steps.launch("step")
        assert outputs is not None
        equal(outputs["target"].numpy(), np.full(source.shape, value, np.float32), f"launch {value}")
    figures = {
        "calls_s": seconds(lambda: execute(context.stream), context),
        "graph_s": seconds(lambda: steps.launch("step"), context),
    }
    cuda("cudaDeviceSynchronize")
    steps.close()
    return figures


def exchange(library: str, context: DeviceContext) -> dict[str, Any]:
    """Arrays pass to and from another library without a copy, and in order of its stream."""
    if find_spec(library) is None:
        raise LeftOut(f"{library} is not installed")
    if not on_device(context):
        raise LeftOut("addresses of the stand-in are not valid for other libraries")
    if library == "torch":
        import torch

        if not torch.cuda.is_available():
            raise LeftOut("this torch has no CUDA")
        make, read, address = (lambda v: torch.from_numpy(v).cuda()), (lambda t: t.cpu().numpy()), torch.Tensor.data_ptr
        take, stream, enter = torch.from_dlpack, torch.cuda.Stream(), torch.cuda.stream
    else:
        import cupy

        make, read, address = cupy.asarray, cupy.asnumpy, lambda array: array.data.ptr
        take, stream, enter = cupy.from_dlpack, cupy.cuda.Stream(non_blocking=True), lambda stream: stream
    value = np.random.default_rng(0).normal(size=(64, 1024, 256)).astype(np.float32)
    ours = context.upload(value)
    theirs = take(ours)
    assert address(theirs) == ours.address, f"{library} copied the array"
    equal(read(theirs), value, f"export to {library}")
    theirs *= 2
    equal(read(theirs), value * 2, f"computation in {library}")
    equal(ours.numpy(), value * 2, f"what {library} wrote")
    for number in range(1, 6):
        with enter(stream):  # long work of the other library, which the chain must wait for
            made = make(value)
            for _ in range(number):
                made = made * 2
            taken = array_ops.accept(made, context)
            assert taken.address == address(made), f"an array of {library} was copied"
            equal(taken.copy().numpy(), value * 2.0**number, f"import from {library}")
    return {"mebibytes": value.nbytes >> 20}


STEPS: dict[str, Callable[[DeviceContext], dict[str, Any]]] = {
    "device": device, "arrays": arrays, "resize": resizing, "streams": streams, "graphs": graphs,
    "torch": lambda context: exchange("torch", context), "cupy": lambda context: exchange("cupy", context),
}  # fmt: skip


def pretend(cache: Path, bundle: Path | None, backend: str | None) -> None:
    """Put the stand-ins in the place of CUDA and a TensorRT in this process, with engines as `build` sizes them."""
    import pytest

    from bridge_stg.export.engines.profiles import profiles_of
    from bridge_stg.runtime.bundle.bundle import Bundle
    from tests.fakes.machine import FakeMachine

    family = NATIVE.get(str(backend))
    machine = FakeMachine(pytest.MonkeyPatch(), cache, family=family or "tensorrt", eager=())
    if bundle is not None and family is not None:
        loaded = Bundle.load(bundle)
        for name in loaded.manifest.graphs:
            graph = loaded.graph(name, "standard")
            found = profiles_of(graph, loaded.manifest.spec)
            machine.build_graph(loaded, graph, list(found.profiles.values()), capacity=found.capacity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[*STEPS, "chain"])
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("backend", nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pretend", action="store_true")
    options = parser.parse_args()
    try:
        if options.pretend:
            pretend(options.out.parent / "cache", options.bundle, options.backend)
        if options.step == "chain":
            figures = chain(options.bundle, options.backend, folder=options.out.parent, pretended=options.pretend)
        else:
            context = DeviceContext().open()
            figures = STEPS[options.step](context)
            context.close()
        result: dict[str, Any] = {"status": "passed", "figures": figures}
    except LeftOut as reason:
        result = {"status": "left out", "problem": str(reason)}
    except BridgeError as error:
        result = {"status": "failed", "problem": f"{error} [{error.code}]"}
    if problem := result.get("figures", {}).pop("problem", None):
        result |= {"status": "failed", "problem": problem}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
