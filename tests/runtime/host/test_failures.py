"""Errors that the system caused are told from faults of the input, whichever library raised them."""

from __future__ import annotations

import builtins
import errno
import resource
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bridge_stg.runtime.errors import BridgeError, EngineError, HostError, VideoError
from bridge_stg.runtime.host import failures
from bridge_stg.runtime.host.failures import host_error, reporting_host_errors
from tests.errors import raises


class Fail(Exception):
    """An exception of onnxruntime."""


Fail.__module__ = "onnxruntime.capi.onnxruntime_pybind11_state"


def code_of(error: BaseException) -> str | None:
    found = host_error(error)
    return None if found is None else found.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "host.out_of_memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host.out_of_memory"),
        (
            Fail("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 8"),
            "host.out_of_memory",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"), "host.out_of_memory"),
        (OSError("out of memory error when reading image file"), "host.out_of_memory"),
        (RuntimeError("can't allocate lock"), "host.out_of_memory"),
        (RuntimeError("can't start new thread"), "host.out_of_threads"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "host.out_of_threads"),
        (av.error.BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "host.out_of_threads"),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), "host.subprocess_killed"),
        (OSError(errno.EMFILE, "Too many open files"), "host.too_many_files"),
        (OSError(errno.ENFILE, "Too many open files in system"), "host.too_many_files"),
        (Exception("Too many open files (os error 24)"), "host.too_many_files"),
        (ImportError("a.so: failed to map segment from shared object"), "host.out_of_memory"),
        (RuntimeError("SystemError : 24"), "host.too_many_files"),  # onnxruntime, also the next
        (RuntimeError("Load model from a.onnx failed:system error number 24"), "host.too_many_files"),
        (OSError(errno.ENOSPC, "No space left on device"), "output.disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "output.disk_full"),
        (OSError(errno.EFBIG, "File too large"), "output.not_writable"),
        (OSError(errno.EROFS, "Read-only file system"), "output.not_writable"),
        (PermissionError(errno.EACCES, "Permission denied", "a.json"), "host.file"),
        (OSError(errno.EIO, "Input/output error", "a.json"), "host.file"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (ValueError("the query is: out of memory"), None),
        (RuntimeError("maximum recursion depth exceeded"), None),
        (VideoError("video.unreadable", "out of memory"), None),
        (av.error.PermissionError(errno.EPERM, "Operation not permitted"), None),
        (av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory"), None),  # of an impossible size: there is memory
    ],
    ids=repr,
)
def test_what_the_system_caused(error: BaseException, code: str | None) -> None:
    assert code_of(error) == code
    kinds = {"video.unreadable": VideoError, "bundle.unreadable": BridgeError, "host.missing_package": BridgeError}
    for outer in (kind(outer_code, "damaged") for outer_code, kind in kinds.items()):
        for attribute in ("__cause__", "__context__"):
            outer.__cause__ = outer.__context__ = None
            setattr(outer, attribute, error)
            assert code_of(outer) == code


def test_where_no_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "TRIED_BYTES", 2**62)
    assert code_of(RuntimeError("can't start new thread")) == "host.out_of_memory"
    assert code_of(av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")) == "host.out_of_memory"


def test_an_error_that_names_the_system_stays() -> None:
    for code in ("output.not_writable", "engine.out_of_memory", "video.no_permission", "live.no_camera", "host.file"):
        error = EngineError(code, "says more")
        error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
        assert host_error(error) is None
    wrapped = VideoError("video.unreadable", "damaged")
    wrapped.__cause__ = EngineError("host.subprocess_killed", "needs more memory than its limit")
    assert host_error(wrapped) is None
    wrapped.__cause__ = HostError("host.out_of_memory", "no more memory")
    assert host_error(wrapped) is wrapped.__cause__


def test_only_a_shortage_replaces_the_callers_own_errors() -> None:
    with pytest.raises(PermissionError), reporting_host_errors():
        raise PermissionError(errno.EACCES, "Permission denied")
    with raises("host.out_of_memory", kind=HostError), reporting_host_errors():
        raise MemoryError
    with raises("host.file", "a.json", kind=HostError), reporting_host_errors():
        raise BridgeError("bundle.unreadable", "damaged") from PermissionError(
            errno.EACCES, "Permission denied", "a.json"
        )


def test_a_limit_of_file_sizes_in_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(Exception, match="os error") as caught:
            safetensors.save_file({"x": np.zeros(1000)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code_of(caught.value) == "output.not_writable"


def test_unreadable_files_are_not_called_damaged(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bridge_stg import cli
    from bridge_stg.runtime import Grounder

    real = builtins.open

    def deny(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith("manifest.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("io.open", deny)
    monkeypatch.setattr(builtins, "open", deny)
    with raises("host.file", "manifest.json", kind=HostError):
        Grounder.load(bundle_path)
    assert cli.run(["inspect", str(bundle_path)]) == 2
