"""`doctor`: a bare machine, a Jetson, a server with a GPU, and packages in each other's way."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.cli import run
from bridge_stg.runtime.backends.doctor import Diagnosis, diagnose, format_diagnosis
from bridge_stg.runtime.backends.registry import BACKENDS
from bridge_stg.runtime.host.machine import Machine, machine
from bridge_stg.runtime.host.packages import install_command
from tests.fakes.kernels import FakeNvrtc

ROOT = Path(__file__).resolve().parents[3]
BUDDYINFO = """Node 0, zone      DMA      0      0      0
Node 0, zone   Normal   8120   2000      3      0      0
"""
X86 = {
    "proc/cpuinfo": "processor : 0\nmodel name\t: AMD EPYC 9354\nflags\t\t: fpu avx2 fma avx512f avx512_vnni\n",
    "proc/meminfo": "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n",
    "proc/buddyinfo": BUDDYINFO,
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
}
JETSON = {
    **X86,
    "proc/cpuinfo": "processor : 0\nFeatures\t: fp asimd asimddp i8mm\n",
    "proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable: 3000000 kB\nCmaTotal: 262144 kB\nCmaFree: 131072 kB\n",
    "proc/driver/nvidia/version": "",
    "sys/module/nvidia/version": "540.4.0\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
}


class FakeCuda:
    """libcuda of one device, as ctypes calls it: pointers come as byref(), results are status codes."""

    def __init__(self, *, sm: tuple[int, int] = (9, 0), integrated: int = 0, status: int = 0, largest: int = 0) -> None:
        self.attributes = {16: 132, 18: integrated, 75: sm[0], 76: sm[1]}
        self.status, self.largest, self.tried, self.contexts = status, largest, 0, 0

    @staticmethod
    def put(pointer: Any, value: Any) -> int:
        pointer._obj.value = value  # noqa: SLF001 - ctypes has no public way to the object of a byref
        return 0

    def cuDriverGetVersion(self, pointer: Any) -> int:
        return self.put(pointer, 13010)

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuGetErrorString(self, status: int, pointer: Any) -> int:
        return self.put(pointer, b"no CUDA-capable device is detected")

    def cuDeviceGetCount(self, pointer: Any) -> int:
        return self.put(pointer, 1)

    def cuDeviceGet(self, pointer: Any, index: int) -> int:
        return self.put(pointer, index)

    def cuDeviceGetName(self, buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"NVIDIA H100"
        return 0

    def cuDeviceGetAttribute(self, pointer: Any, which: int, device: Any) -> int:
        return self.put(pointer, self.attributes[which])

    def cuDevicePrimaryCtxRetain(self, pointer: Any, device: Any) -> int:
        self.contexts += 1
        return self.put(pointer, 1)

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        self.contexts -= 1
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        self.put(total, 80 * 2**30)
        return self.put(free, 60 * 2**30)

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        self.tried += 1
        assert isinstance(size, ctypes.c_size_t)
        return 0 if size.value <= self.largest else 2

    def cuMemFree_v2(self, address: Any) -> int:
        return 0


def look(tmp_path: Path, files: dict[str, str], cuda: Any) -> Machine:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return machine(root=tmp_path, libcuda=cuda)


def diagnosed(
    found: Machine,
    packages: dict[str, str],
    providers: tuple[str, ...] = (),
    nvinfer: int = 0,
    nvrtc: tuple[int, ...] = (87, 90),
) -> Diagnosis:
    class Onnxruntime:
        @staticmethod
        def get_available_providers() -> list[str]:
            return list(providers)

    class Library:
        @staticmethod
        def getInferLibVersion() -> int:
            return nvinfer

    def load(name: str) -> Any:
        if name == "onnxruntime" and providers:
            return Onnxruntime
        if name == "tensorrt" and nvinfer:
            return object()
        if name == "cuda.bindings.nvrtc" and nvrtc:
            return FakeNvrtc(knows=nvrtc)
        if nvinfer and name == f"libnvinfer.so.{nvinfer // 10000 if nvinfer >= 100000 else nvinfer // 1000}":
            return Library
        raise OSError(name) if ".so." in name else ModuleNotFoundError(name)

    return diagnose(facts=found, version=packages.get, load=load)


def lacks(diagnosis: Diagnosis, backend: str) -> dict[str, str]:
    state = next(state for state in diagnosis.backends if state.name == backend)
    return {item.what: item.command for item in state.missing}


def test_server(tmp_path: Path) -> None:
    cuda = FakeCuda(largest=40 * 2**30)
    found = look(tmp_path, X86, cuda)
    assert (found.cpu, found.cpu_flags) == ("AMD EPYC 9354", ("avx2", "fma", "avx512f", "avx512_vnni"))
    assert (found.driver, found.cuda, found.l4t, found.board) == ("580.65.06", "13.1", None, None)
    assert found.memory.available == 8000000 * 1024
    assert (found.memory.largest_block, found.memory.largest_blocks) == (4 * os.sysconf("SC_PAGE_SIZE"), 3)
    (device,) = found.devices
    assert (device.name, device.sm, device.multiprocessors) == ("NVIDIA H100", 90, 132)
    assert device.largest_block is not None and 39 * 2**30 < device.largest_block <= 40 * 2**30
    assert cuda.contexts == 0 and cuda.tried < 12
    packages = {"onnxruntime-gpu": "1.32.0", "cuda-python": "13.0.1", "tensorrt": "10.15.1"}
    diagnosis = diagnosed(found, packages, ("CUDAExecutionProvider", "CPUExecutionProvider"), nvinfer=101501)
    assert diagnosis.tensorrt == {"tensorrt": "10.15.1", "libnvinfer.so.10": "10.15.1"}
    ready = {state.name for state in diagnosis.backends if state.ready}
    assert {"tensorrt", "onnxruntime-cuda", "onnxruntime"} <= ready
    (what,) = [what for what in lacks(diagnosis, "onnxruntime-tensorrt") if "TensorrtExecutionProvider" in what]
    assert "CUDAExecutionProvider" in what
    assert "SM 90" in format_diagnosis(diagnosis) and "60.0 GiB of 80.0 GiB free" in format_diagnosis(diagnosis)


def test_all_of_the_memory_in_one_piece(tmp_path: Path) -> None:
    found = look(tmp_path, X86, FakeCuda(largest=80 * 2**30))
    assert found.devices[0].largest_block == 60 * 2**30


def test_jetson(tmp_path: Path) -> None:
    cuda = FakeCuda(sm=(8, 7), integrated=1)
    found = look(tmp_path, JETSON, cuda)
    assert (found.board, found.l4t, found.jetpack) == ("NVIDIA Jetson Orin Nano Developer Kit", "36.4.3", "6.1 or 6.2")
    assert found.driver == "540.4.0" and found.cpu_flags == ("asimddp", "i8mm")
    assert found.memory.cma_free == 131072 * 1024
    assert found.devices[0].integrated and found.devices[0].largest_block is None and cuda.tried == 0
    diagnosis = diagnosed(found, {"numpy": "1.26.4"}, nvinfer=100300)
    assert diagnosis.tensorrt == {"libnvinfer.so.10": "10.3.0"}
    assert "sudo apt install python3-libnvinfer" in lacks(diagnosis, "tensorrt")["the package tensorrt"]
    assert "use the backend tensorrt" in lacks(diagnosis, "onnxruntime-cuda")["the package onnxruntime-gpu"]
    assert any("fragmented" in item.what and "compact_memory" in item.command for item in diagnosis.problems)
    text = format_diagnosis(diagnosis)
    assert "JetPack 6.1 or 6.2" in text and "shares the host's memory" in text and "CMA 128.0 MiB of 256.0 MiB" in text


def test_driver_without_a_device(tmp_path: Path) -> None:
    found = look(tmp_path, X86, FakeCuda(status=100))
    assert not found.devices and "no CUDA-capable device" in str(found.device_problem)
    assert any("no CUDA-capable device" in what for what in lacks(diagnosed(found, {}), "tensorrt-rtx"))


def test_bare_machine(tmp_path: Path) -> None:
    found = machine(root=tmp_path)
    diagnosis = diagnosed(found, {"numpy": "2.4.6"})
    assert not any(state.ready for state in diagnosis.backends)
    for backend in BACKENDS:
        assert install_command(backend.extra) in lacks(diagnosis, backend.name).values()
    assert diagnosis.problems[0].command == "pip install av pillow tokenizers llguidance click tqdm jinja2"
    assert json.loads(json.dumps(diagnosis.to_json()))["backends"][0]["ready"] is False


def test_two_flavours_of_onnxruntime(tmp_path: Path) -> None:
    packages = {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.32.0"}
    diagnosis = diagnosed(machine(root=tmp_path), packages, ("CPUExecutionProvider",))
    (problem,) = [item for item in diagnosis.problems if "flavours" in item.what]
    assert problem.command == f"pip uninstall -y onnxruntime onnxruntime-gpu && {install_command('gpu')}"
    assert problem.what in format_diagnosis(diagnosis)


def test_broken_onnxruntime(tmp_path: Path) -> None:
    diagnosis = diagnosed(machine(root=tmp_path), {"onnxruntime": "1.32.0"})
    assert any("cannot be imported" in item.what for item in diagnosis.problems)


def test_jetson_that_takes_wheels(tmp_path: Path) -> None:
    release = JETSON["etc/nv_tegra_release"].replace("R36 (release), REVISION: 4.3", "R38 (release), REVISION: 2.0")
    found = look(tmp_path, {**JETSON, "etc/nv_tegra_release": release}, FakeCuda(status=100))
    assert found.jetpack == "7.0"
    later = release.replace("R38 (release), REVISION: 2.0", "R39 (release), REVISION: 2.1")
    assert look(tmp_path, {"etc/nv_tegra_release": later}, FakeCuda(status=100)).jetpack == "7.2"
    lacking = lacks(diagnosed(found, {}), "tensorrt")
    assert lacking["the package tensorrt"] == install_command("tensorrt")
    (gpu,) = [command for what, command in lacking.items() if "an NVIDIA GPU" in what]
    assert "ubuntu-drivers" not in gpu and "--runtime nvidia" in gpu


@pytest.mark.parametrize(("installed", "lacking"), [("10.3.0", False), ("11.4.0.106", True), (None, True)])
def test_jetpack_6_runs_only_its_own_tensorrt(tmp_path: Path, installed: str | None, lacking: bool) -> None:
    found = look(tmp_path, JETSON, FakeCuda(status=100))
    diagnosis = diagnosed(found, {} if installed is None else {"tensorrt": installed})
    commands = [command for what, command in lacks(diagnosis, "tensorrt").items() if "JetPack" in what + command]
    assert ["python3.10 -m venv" in command for command in commands] == [True] * lacking


def test_broken_tensorrt(tmp_path: Path) -> None:
    diagnosis = diagnosed(look(tmp_path, X86, FakeCuda()), {"tensorrt": "10.15.1", "cuda-python": "13.0.1"})
    (lacking,) = lacks(diagnosis, "tensorrt").items()
    what = "a tensorrt that can be imported (tensorrt)"
    command = install_command("tensorrt", options="--force-reinstall ")
    assert lacking == (what, command)


def test_an_nvrtc_that_cannot_compile_for_the_device_is_a_failed_line(tmp_path: Path) -> None:
    found = look(tmp_path, X86, FakeCuda(sm=(12, 0)))
    for nvrtc in ((87, 90), ()):  # too old, missing
        diagnosis = diagnosed(found, {"tensorrt": "10.15.1", "cuda-python": "12.9.7"}, nvinfer=101501, nvrtc=nvrtc)
        (lacking,) = lacks(diagnosis, "tensorrt").items()
        assert "NVRTC" in lacking[0] and lacking[1] == "pip install -U nvidia-cuda-nvrtc-cu12"
        assert f"    missing: {lacking[0]}" in format_diagnosis(diagnosis)


def test_no_driver(tmp_path: Path) -> None:
    assert "\ndriver       none\n" in format_diagnosis(diagnosed(machine(root=tmp_path), {}))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    assert "backends, in the order" in capsys.readouterr().out
    assert run(["doctor", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [state["name"] for state in values["backends"]] == [backend.name for backend in BACKENDS]


@pytest.mark.parametrize("there", ["numpy", "click", "nothing"])
def test_on_a_bare_machine(tmp_path: Path, there: str) -> None:
    """Every backend is told without any package."""
    blocker = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.partition('.')[0]\n"
        f"        if top not in sys.stdlib_module_names and top not in ({there!r}, 'bridge_stg'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        f"sys.argv = ['cli.py', 'doctor']; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import runpy; runpy.run_path({str(ROOT / 'cli.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", blocker], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "backends, in the order" in done.stdout
    assert all(f"  {backend.name}" in done.stdout for backend in BACKENDS)
