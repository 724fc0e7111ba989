"""The table of targets to build engines for: GPU, TensorRT, variant, precisions, memory.

TensorRT-RTX compiles ahead of time, on any x86-64 machine, for the compute capabilities of its target; TensorRT 10 and
11 compile on the device only. Precisions follow NVIDIA's support matrices, as far as graphs of this project have them;
`support` says how an engine runs a quantized graph.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.packages import install_command, version_numbers

TURING = ("fp32", "fp16", "int8")
AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")
ADA = (*AMPERE, "fp8")
BLACKWELL = (*ADA, "nvfp4")
GB = 10**9
PRIMITIVE_ONLY_BELOW = (10, 15)
"""TensorRT before this version takes `primitive` only: it lacks the cache update and, before 10.14, Attention."""

Version = tuple[int, ...]


@dataclass(frozen=True)
class EngineTarget:
    """One row of the table.

    Attributes:
        name: value of `--target`.
        device: description of the devices.
        family: `tensorrt` or `tensorrt_rtx`.
        since, before: first TensorRT version, and the first that is not supported.
        sms: compute capabilities, 87 for 8.7.
        variant: variant of the graphs.
        precisions: precisions of its GPUs.
        memory: bytes for weights, KV cache and intermediate tensors, on the smallest of its common devices.
    """

    name: str
    device: str
    family: str
    since: Version
    before: Version
    sms: tuple[int, ...]
    variant: str
    precisions: tuple[str, ...]
    memory: int

    @property
    def ahead_of_time(self) -> bool:
        """Whether any machine can compile for it."""
        return self.family == "tensorrt_rtx"

    def versions(self) -> str:
        """Return the supported TensorRT versions as text."""
        since, before = (".".join(map(str, version)) for version in (self.since, self.before))
        return f"{'TensorRT-RTX' if self.ahead_of_time else 'TensorRT'} {since} to below {before}"


RTX, RTX_END = (1, 2), (2,)
TARGETS: tuple[EngineTarget, ...] = (
    EngineTarget("rtx-ampere", "RTX 30, A10", "tensorrt_rtx", RTX, RTX_END, (86,), "standard", AMPERE, 8 * GB),
    EngineTarget("rtx-ada", "RTX 40, L4, L40", "tensorrt_rtx", RTX, RTX_END, (89,), "standard", ADA, 8 * GB),
    EngineTarget("rtx-blackwell", "RTX 50", "tensorrt_rtx", RTX, RTX_END, (120,), "standard", BLACKWELL, 8 * GB),
    EngineTarget("orin-jp6", "Orin, JetPack 6.1+", "tensorrt", (10, 0), (10, 15), (87,), "primitive", AMPERE, 6 * GB),
    EngineTarget("orin-jp7", "Orin, JetPack 7.2+", "tensorrt", (10, 15), (12,), (87,), "standard", AMPERE, 6 * GB),
    EngineTarget("thor", "Thor, JetPack 7", "tensorrt", (10, 15), (12,), (101, 110), "standard", BLACKWELL, 100 * GB),
    EngineTarget("a100", "A100", "tensorrt", (10, 15), (12,), (80,), "standard", AMPERE, 38 * GB),
    EngineTarget("h100", "H100, H200", "tensorrt", (10, 15), (12,), (90,), "standard", ADA, 76 * GB),
    EngineTarget("b200", "B200", "tensorrt", (10, 15), (12,), (100,), "standard", BLACKWELL, 170 * GB),
)
"""The target `this` is added by `this_target`."""


def ahead_of_time() -> list[str]:
    """Return the names of targets that any machine can compile for."""
    return [target.name for target in TARGETS if target.ahead_of_time]


ON_THE_DEVICE = f"Run this command on the device, or compile ahead of time for one of {', '.join(ahead_of_time())}"

PRECISIONS_BY_SM = ((100, BLACKWELL), (89, ADA), (80, AMPERE), (75, TURING), (0, ("fp32", "fp16")))


def find_target(name: str) -> EngineTarget:
    """Return the target of a name; raise EngineError if it is unknown."""
    found = next((target for target in TARGETS if target.name == name), None)
    if found is None:
        known = ", ".join(target.name for target in TARGETS)
        raise EngineError("options.invalid", f"target {name!r} is unknown; known: this, {known}.")
    return found


def this_target(*, family: str, version: str, sm: int, memory: int | None) -> EngineTarget:
    """Return the target of this machine, from its TensorRT, and compute capability and total bytes of its GPU.

    Raises EngineError if this TensorRT cannot run the project's graphs on this GPU.
    """
    numbers = version_numbers(version)
    variant = "primitive" if family == "tensorrt" and numbers < PRIMITIVE_ONLY_BELOW else "standard"
    precisions = next(words for since, words in PRECISIONS_BY_SM if sm >= since)
    if family == "tensorrt_rtx" and sm < 80:
        message = f"TensorRT-RTX has no fp32 matmuls on SM {sm}. Use TensorRT, or {install_command('gpu')}"
        raise EngineError("engine.unsupported_device", message)
    limit = 8 * GB if memory is None else int(0.9 * memory)
    return EngineTarget("this", f"SM {sm}", family, numbers[:2], (99,), (sm,), variant, precisions, limit)


def check_installed(target: EngineTarget, *, version: str, sm: int | None) -> EngineTarget:
    """Return the target, narrowed to this machine's GPU (`sm`, None without one) if it is compiled on the device.

    Raises EngineError if the version is out of the target's range, or the GPU is another one.
    """
    if not target.since <= version_numbers(version) < target.before:
        found = f"target {target.name} requires {target.versions()}, but {version} is installed"
        raise EngineError("engine.wrong_version", f"{found}. Install one of these, or use --target this")
    return target if target.ahead_of_time else check_device(target, sm)


def check_device(target: EngineTarget, sm: int | None) -> EngineTarget:
    """Return a target that is compiled on the device, narrowed to this machine's GPU; see `check_installed`."""
    if sm is None or sm not in target.sms:
        here = "no GPU was found here" if sm is None else f"the GPU here is SM {sm}"
        message = f"target {target.name} is for SM {' or '.join(map(str, target.sms))}, but {here}. {ON_THE_DEVICE}"
        raise EngineError("engine.no_device", message)
    return dataclasses.replace(target, sms=(sm,))


def check_precision(target: EngineTarget, precision: str) -> None:
    """Raise EngineError if the target lacks the precision of a graph, such as `int8 w8a8`: the first word counts."""
    word = precision.split(maxsplit=1)[0]
    if word not in target.precisions:
        message = f"target {target.name} has no {word}; use a bundle in {', '.join(target.precisions)}"
        raise EngineError("engine.unsupported_precision", message)


def target_table() -> str:
    """Return the table as text."""
    rows = [
        ("target", "device", "TensorRT", "SM", "variant", "precisions", "memory"),
        *((t.name, t.device, t.versions(), "/".join(map(str, t.sms)), t.variant, " ".join(t.precisions),
           f"{t.memory / GB:.0f} GB") for t in TARGETS),
        ("this", "this machine's GPU", "the installed one", "its own", "by version", "as its GPU", "its own"),
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
