"""Report the machine's devices and packages, and what each backend is missing, with the command that installs it.

Needs the standard library only.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime.backends.registry import BACKENDS, Backend
from bridge_stg.runtime.backends.tensorrt.library import MODULES
from bridge_stg.runtime.device.kernel import compile_kernel
from bridge_stg.runtime.host.machine import Machine, machine
from bridge_stg.runtime.host.packages import install_command, installed_version

NEEDED = ("numpy", "av", "pillow", "tokenizers", "llguidance", "click", "tqdm", "jinja2")
"""Distributions that every backend needs."""

FLAVOURS = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-rocm",
    "onnxruntime-migraphx", "onnxruntime-qnn", "onnxruntime-training",
)  # fmt: skip
"""Distributions that all install the folder `onnxruntime/`, and overwrite parts of each other."""

TENSORRT = (
    "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12-bindings",
    "tensorrt-rtx-cu13-bindings",
)  # fmt: skip
TENSORRT_LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so.8")
FAMILIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""TensorRT family of the backends that import it themselves."""
WHEELS_SINCE_L4T = 38
"""Earlier Jetson Linux (JetPack 6) only runs the TensorRT of JetPack."""
JETPACK6_TENSORRT = (10, 3)
"""The newest TensorRT of JetPack 6, whose package is for Python 3.10."""
PROVIDERS = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}
"""Provider that onnxruntime must list for a backend to run."""


@dataclass(frozen=True)
class Missing:
    """Something that is missing, and the command or action that installs it."""

    what: str
    command: str


@dataclass(frozen=True)
class BackendState:
    """A backend, its package's version (None: not installed) and what is missing. Ready if nothing is."""

    name: str
    version: str | None
    missing: tuple[Missing, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`.

    Attributes:
        machine: processor, memory and devices.
        packages: version of each package of `NEEDED`; None if it is missing.
        onnxruntime: version of each installed flavour.
        providers: providers that onnxruntime lists; empty if it cannot be imported.
        tensorrt: version of each TensorRT package and library.
        backends: best first, as "auto" tries them.
        problems: problems that do not belong to one backend.
    """

    machine: Machine
    packages: dict[str, str | None]
    onnxruntime: dict[str, str]
    providers: tuple[str, ...]
    tensorrt: dict[str, str]
    backends: tuple[BackendState, ...]
    problems: tuple[Missing, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = dataclasses.asdict(self)
        for state, entry in zip(self.backends, values["backends"], strict=True):
            entry["ready"] = state.ready
        return values


Version = Callable[[str], "str | None"]


def diagnose(
    *, facts: Machine | None = None, version: Version = installed_version, load: Callable[[str], Any] | None = None
) -> Diagnosis:
    """Check this machine and the packages of this Python.

    Args:
        facts: facts about the machine; None: this machine.
        version: returns the installed version of a package.
        load: imports a module, or opens a shared library if the name ends in .so and a number; None: the real ones.
    """
    facts, load = facts or machine(), load or _load
    packages = {name: version(name) for name in NEEDED}
    flavours = {name: v for name in FLAVOURS if (v := version(name)) is not None}
    providers, broken = _providers(load, bool(flavours))
    tensorrt = {name: v for name in TENSORRT if (v := version(name)) is not None}
    tensorrt |= {name: v for name in TENSORRT_LIBRARIES if (v := _library_version(load, name)) is not None}
    states = tuple(_state(backend, facts, version, providers, load) for backend in BACKENDS)
    return Diagnosis(
        facts, packages, flavours, providers, tensorrt, states, (*_problems(packages, flavours, facts), *broken)
    )


def _load(name: str) -> Any:
    return ctypes.CDLL(name) if ".so." in name else importlib.import_module(name)


def _providers(load: Callable[[str], Any], is_installed: bool) -> tuple[tuple[str, ...], tuple[Missing, ...]]:
    try:
        return tuple(load("onnxruntime").get_available_providers()), ()
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything
        if not is_installed:
            return (), ()
        command = install_command("cpu", options="--force-reinstall ")
        return (), (Missing(f"onnxruntime is installed but cannot be imported ({error})", command),)


def _library_version(load: Callable[[str], Any], name: str) -> str | None:
    try:
        number = int(load(name).getInferLibVersion())
    except (OSError, AttributeError):
        return None
    parts = (number // 10000, number // 100 % 100, number % 100)  # from TensorRT 10 on
    return ".".join(map(str, parts if number >= 100000 else (number // 1000, number // 100 % 10, number % 100)))


def _state(
    backend: Backend, facts: Machine, version: Version, providers: tuple[str, ...], load: Callable[[str], Any]
) -> BackendState:
    own = next((v for name in backend.distributions if (v := version(name)) is not None), None)
    missing = []
    if own is None:
        missing.append(Missing(f"the package {backend.distributions[0]}", _command(backend, facts)))
    elif backend.name == "tensorrt" and _is_jetpack6(facts) and _too_new(own):
        what = f"the TensorRT of JetPack 6, for Python 3.10 (found {own} for CUDA 13, Python {facts.python})"
        missing.append(Missing(what, _command(backend, facts)))
    elif backend.name in FAMILIES and (problem := _broken(MODULES[FAMILIES[backend.name]], load)):
        command = install_command(backend.extra, options="--force-reinstall ")
        missing.append(Missing(f"a {backend.name} that can be imported ({problem})", command))
    if backend.on_gpu:
        missing += _gpu_missing(facts, version, load)
    provider = PROVIDERS.get(backend.name)
    if own is not None and provider is not None and provider not in providers:
        listed = ", ".join(providers) or "none"
        command = f"pip uninstall -y {' '.join(FLAVOURS[:2])} && {install_command(backend.extra)}"
        missing.append(Missing(f"onnxruntime's {provider} (it lists: {listed})", command))
    return BackendState(backend.name, own, tuple(missing))


def _command(backend: Backend, facts: Machine) -> str:
    """Return the command that installs a backend's package on this machine."""
    if facts.l4t and backend.distributions[0] == "onnxruntime-gpu":
        return "no matching wheel is published for a Jetson: use the backend tensorrt"
    if facts.architecture == "aarch64" and backend.extra in ("rtx", "rtx-provider"):
        return "no wheel is published for 64-bit Arm: use the backend tensorrt"
    if backend.name == "tensorrt" and _is_jetpack6(facts):
        return "sudo apt install python3-libnvinfer (of JetPack), then python3.10 -m venv --system-site-packages …"
    return install_command(backend.extra)


def _is_jetpack6(facts: Machine) -> bool:
    return bool(facts.l4t) and int(str(facts.l4t).partition(".")[0]) < WHEELS_SINCE_L4T


def _too_new(version: str) -> bool:
    """Return whether this TensorRT is a wheel for CUDA 13 rather than that of JetPack 6."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) > JETPACK6_TENSORRT


def _broken(modules: tuple[str, ...], load: Callable[[str], Any]) -> str | None:
    """Return why none of these modules can be imported; None if one can."""
    problems = []
    for name in modules:
        try:
            load(name)
            return None
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything
            problems.append(" ".join(str(error).split()))
    return "; ".join(problems)


def _gpu_missing(facts: Machine, version: Version, load: Callable[[str], Any]) -> list[Missing]:
    missing = []
    if not facts.devices:
        if facts.l4t:
            command = "sudo apt install nvidia-l4t-cuda; in a container: docker run --runtime nvidia …"
        else:
            command = "sudo ubuntu-drivers install (on Ubuntu); in a container: docker run --gpus all …"
        missing.append(Missing(f"an NVIDIA GPU ({facts.device_problem or 'none is listed'})", command))
    if version("cuda-python") is None and version("cuda-bindings") is None:
        major = (facts.cuda or "13").partition(".")[0]
        missing.append(Missing("the package cuda-python", f'pip install "cuda-python<{int(major) + 1}"'))
    elif facts.devices:
        missing += _kernel_missing(facts.devices[0].sm, version, load)
    return missing


def _kernel_missing(sm: int, version: Version, load: Callable[[str], Any]) -> list[Missing]:
    """Compile the kernel that resizes images for a device; return what prevents it."""
    try:
        compile_kernel(sm, load("cuda.bindings.nvrtc"))
        return []
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything
        major = (version("cuda-python") or version("cuda-bindings") or "13").partition(".")[0]
        command = f"pip install -U {'nvidia-cuda-nvrtc-cu12' if major == '12' else 'nvidia-cuda-nvrtc'}"
        what = f"an NVRTC that compiles for this device, so images are resized on the host ({error})"
        return [Missing(what, command)]


def _problems(packages: dict[str, str | None], flavours: dict[str, str], facts: Machine) -> list[Missing]:
    problems = []
    lacking = [name for name, version in packages.items() if version is None]
    if lacking:
        what = f"packages of the runtime are missing: {', '.join(lacking)}"
        problems.append(Missing(what, f"pip install {' '.join(lacking)}"))
    if len(flavours) > 1:
        names = ", ".join(f"{name} {version}" for name, version in flavours.items())
        extra = "gpu" if "onnxruntime-gpu" in flavours else "cpu"
        what = f"{len(flavours)} flavours of onnxruntime are installed over each other ({names}), so some are damaged"
        problems.append(Missing(what, f"pip uninstall -y {' '.join(flavours)} && {install_command(extra)}"))
    memory = facts.memory
    if facts.l4t and memory.largest_block is not None and memory.largest_block < 2**22:
        size = _size(memory.largest_block)
        what = f"memory is fragmented: the largest contiguous block is {size}, and a GPU allocation may fail"
        command = "sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory'"
        problems.append(Missing(what, command))
    return problems


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Format a diagnosis as text."""
    facts = diagnosis.machine
    board = (
        f"{facts.board}, Jetson Linux {facts.l4t} (JetPack {facts.jetpack or 'unknown'})" if facts.l4t else facts.board
    )
    lines = [
        ("system", f"{facts.system}, {facts.architecture}, Python {facts.python}"),
        *([("board", board)] if board else []),
        ("processor", f"{facts.cpu}, {facts.cores} cores, {' '.join(facts.cpu_flags) or 'no relevant vector flags'}"),
        ("memory", _memory_line(facts)),
        ("driver", (facts.driver or "none") + (f", CUDA up to {facts.cuda}" if facts.cuda else "")),
    ]
    for device in facts.devices:
        shared = ", shares the host's memory" if device.integrated else ""
        block = "" if device.largest_block is None else f", largest allocation {_size(device.largest_block)}"
        memory = f"{_size(device.free)} of {_size(device.memory)} free"
        lines.append((f"device {device.index}", f"{device.name}, SM {device.sm}, {memory}{block}{shared}"))
    if not facts.devices:
        lines.append(("device", f"none: {facts.device_problem}"))
    lines += [
        ("packages", ", ".join(f"{name} {version or 'MISSING'}" for name, version in diagnosis.packages.items())),
        ("onnxruntime", ", ".join(f"{name} {version}" for name, version in diagnosis.onnxruntime.items()) or "none"),
        ("providers", ", ".join(diagnosis.providers) or "none"),
        ("TensorRT", ", ".join(f"{name} {version}" for name, version in diagnosis.tensorrt.items()) or "none"),
    ]
    text = [f"{name:12} {value}" for name, value in lines]
    text += ["", "backends, in the order in which `auto` tries them"]
    for state in diagnosis.backends:
        head = f"{state.name} {state.version or ''}".rstrip()
        text.append(f"  {head}: {'ready' if state.ready else 'not ready'}")
        text += [f"    missing: {item.what}\n      {item.command}" for item in state.missing]
    if diagnosis.problems:
        text += ["", "problems", *(f"  {item.what}\n    {item.command}" for item in diagnosis.problems)]
    return "\n".join(text)


def _memory_line(facts: Machine) -> str:
    memory = facts.memory
    line = f"{_size(memory.available)} of {_size(memory.total)} available"
    if memory.largest_block is not None:
        line += f", largest contiguous block {_size(memory.largest_block)} (× {memory.largest_blocks})"
    return line + (f", CMA {_size(memory.cma_free)} of {_size(memory.cma_total)} free" if memory.cma_total else "")


def _size(value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def main() -> None:
    """Print a diagnosis, as JSON with `--json`. For machines without the packages of the command line."""
    diagnosis = diagnose()
    print(json.dumps(diagnosis.to_json(), indent=1) if "--json" in sys.argv else format_diagnosis(diagnosis))


if __name__ == "__main__":
    main()
