"""Run one function of a module in a child process, so that its memory is freed and measured on its own.

The child imports modules from the same places as its parent. Job and result are JSON values.
"""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
from typing import Any

from bridge_stg.runtime import errors
from bridge_stg.runtime.errors import BridgeError, EngineError
from bridge_stg.runtime.host.failures import host_error

START = (
    "import json, sys; sys.path[:], function, job = json.load(sys.stdin); "
    "from bridge_stg.runtime.host.subprocess import answer; answer(function, job)"
)


def run_in_subprocess(function: str, job: Any, *, purpose: str, advice: str = "") -> Any:
    """Call `function` with `job` in a child process and return its result.

    Args:
        function: "module:function"; it takes the job as its only argument.
        job: JSON value.
        purpose: what the process does, for error messages: "the process that <purpose> failed".
        advice: sentence to end the message with if the process was killed.

    Raises:
        BridgeError: the function raised one; code, message and class in runtime/errors.py are the same here.
        EngineError: the process was killed by a signal (`host.subprocess_killed`), or failed in another way
            (`host.subprocess_failed`); the message has the last line of its stderr.
    """
    text = json.dumps([[path or "." for path in sys.path], function, job])
    done = subprocess.run([sys.executable, "-c", START], input=text, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        killed = -done.returncode == getattr(signal, "SIGKILL", None)
        why = "most likely it ran out of memory" if killed else "it crashed"
        message = f"the process that {purpose} was killed by signal {-done.returncode}: {why}. {advice}"
        raise EngineError("host.subprocess_killed", message.strip())
    if done.returncode or not done.stdout:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EngineError("host.subprocess_failed", f"the process that {purpose} failed: {lines[-1]}")
    found = json.loads(done.stdout)
    if "code" in found:
        raise error_from_json(found)
    return found["result"]


def answer(function: str, job: Any) -> None:
    """Run in the child: call the function and write its result, or the `BridgeError` that it raised, to stdout."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)  # what libraries print must not mix with the result
        try:
            found: dict[str, Any] = {"result": pkgutil.resolve_name(function)(job)}
        except Exception as error:
            failure = host_error(error) or error
            if not isinstance(failure, BridgeError):
                raise
            found = error_to_json(failure)
        json.dump(found, output)


def error_to_json(error: BridgeError) -> dict[str, Any]:
    """Return an error as JSON values, from which the parent process builds it again."""
    kinds = [kind.__name__ for kind in type(error).__mro__]  # the parent may not know the first ones
    return {"kinds": kinds, "code": error.code, "message": error.message}


def error_from_json(found: dict[str, Any]) -> BridgeError:
    """Build an error from the values that `error_to_json` returned."""
    kinds = (getattr(errors, name) for name in found["kinds"] if hasattr(errors, name))
    error: BridgeError = next(kinds)(found["code"], found["message"])
    return error
