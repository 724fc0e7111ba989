"""A function in a child process: its result, its errors, and how its death is reported."""

from __future__ import annotations

import os
import signal

from bridge_stg.runtime.device.cuda import OutOfDeviceMemory
from bridge_stg.runtime.errors import EngineError, VideoError
from bridge_stg.runtime.host.subprocess import run_in_subprocess
from tests.errors import raises

HERE = "tests.runtime.host.test_subprocess"


def echo(job: dict[str, int]) -> dict[str, int]:
    print("a library that prints")
    return job | {"child": os.getpid()}


def reject(job: str) -> None:
    raise VideoError("video.no_stream", f"{job}: has no video stream")


def run_out_of_memory(job: str) -> None:
    raise OutOfDeviceMemory("engine.out_of_memory", job)


def test_the_result_comes_from_another_process() -> None:
    found = run_in_subprocess(f"{HERE}:echo", {"a": 1}, purpose="echoes")
    assert found.pop("child") != os.getpid() and found == {"a": 1}


def test_an_error_of_the_function_keeps_class_code_and_message() -> None:
    with raises("video.no_stream", "a.mp4: has no video stream", kind=VideoError):
        run_in_subprocess(f"{HERE}:reject", "a.mp4", purpose="reads")


def test_a_class_of_another_module_arrives_as_its_base() -> None:
    with raises("engine.out_of_memory", "2 GB", kind=EngineError):
        run_in_subprocess(f"{HERE}:run_out_of_memory", "2 GB", purpose="allocates")


def test_a_child_without_a_result_has_failed() -> None:
    with raises("host.subprocess_failed", "the process that stops failed", kind=EngineError):
        run_in_subprocess("os:_exit", 0, purpose="stops")


def test_another_exception_is_reported_by_its_last_line() -> None:
    with raises("host.subprocess_failed", "the process that counts failed: ValueError", "'many'", kind=EngineError):
        run_in_subprocess("builtins:int", "many", purpose="counts")


def test_a_killed_process_is_reported_by_its_signal() -> None:
    with raises("host.subprocess_killed", "signal 9", "out of memory", "Use less.", kind=EngineError):
        run_in_subprocess("signal:raise_signal", int(signal.SIGKILL), purpose="dies", advice="Use less.")
    with raises("host.subprocess_killed", "signal 6: it crashed", kind=EngineError):
        run_in_subprocess("signal:raise_signal", int(signal.SIGABRT), purpose="dies")
