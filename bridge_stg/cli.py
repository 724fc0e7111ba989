"""The command line: the group of commands, and the one place where errors become text, JSON and exit codes.

Each command is in bridge_stg/commands and is imported when it is requested.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import click

import bridge_stg
from bridge_stg.commands.progress import LOG, configure_log, log_options
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.failures import host_error
from bridge_stg.runtime.host.packages import install_command

MODULES = {
    "bench": "bench",
    "build": "build estimate",
    "calibrate": "calibrate",
    "evaluate": "convert-refs evaluate evaluate-demo index infer-many",
    "export": "doctor export inspect migrate verify",
    "infer": "ask infer",
    "results": "schema",
    "serve": "serve triton",
    "train": "init train train-demo",
    "watch": "watch",
}
"""Module in bridge_stg.commands → its commands, which are functions with `_` for `-`."""
COMMANDS = {command: module for module, commands in MODULES.items() for command in commands.split()}
EXTRAS = {
    "cpu": "onnxruntime",
    "export": "torch transformers onnx onnx_ir onnxscript safetensors",
    "train": "accelerate peft skimage",
    "tensorrt": "tensorrt cuda",
    "rtx": "tensorrt_rtx_bindings",
    "parquet": "pyarrow",
    "ray": "ray",
    "serve": "fastapi starlette pydantic anyio uvicorn python_multipart prometheus_client",
    "calibrate": "yaml",
    "": "numpy av PIL tokenizers llguidance tqdm jinja2",
}
"""Extra of this package → import names of the packages that it installs."""
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command like Ctrl-C."""
USAGE_CODES: Sequence[tuple[type[click.ClickException], str]] = (
    (click.MissingParameter, "options.missing"),
    (click.BadParameter, "options.invalid"),
    (click.NoSuchOption, "options.unknown"),
    (click.ClickException, "options.usage"),
)


class LazyGroup(click.Group):
    """A group that imports a command when it is requested, so that no command pays for the imports of others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, without importing them."""
        return sorted({*COMMANDS, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, or None if it does not exist."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            module = importlib.import_module(f"bridge_stg.commands.{COMMANDS[cmd_name]}")
            command = log_options(getattr(module, cmd_name.replace("-", "_")))
            command.callback = naming_options(command.callback)
            self.add_command(command, cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names. Raises UsageError, which names a similar one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            if not (similar := difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)):
                raise
            raise click.UsageError(f"{error.message} (Did you mean {similar[0]!r}?)", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first sentence of each command as a whole, on as many lines as it needs."""
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in found if command])


def naming_options(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a command, whose errors name its options: `window_s=9: …` becomes `--window 9: …`."""

    @functools.wraps(call)
    def named(*arguments: Any, **given: Any) -> Any:
        try:
            return call(*arguments, **given)
        except BridgeError as error:
            context = click.get_current_context()
            for option in context.command.params:
                name, value = str(option.name), context.params.get(str(option.name))
                if isinstance(option, click.Option) and value is not None:
                    # An argument of the library may have its unit in its name, and the deadline is what is left of it.
                    argument = rf"(?:^|(?<=: )){name.removesuffix('_s')}(?:_s)?=[^ :]+"
                    parts = value if isinstance(value, tuple) else (value,)
                    shown = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
                    text = f"{option.opts[0]} {shown}".replace("\\", r"\\")
                    error.message = re.sub(argument, text, error.message)
            raise

    return named


@log_options
@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(bridge_stg.__version__, prog_name="bridge-stg")
def app() -> None:
    """Find when and where a sentence happens in a video, and export trained checkpoints for edge devices.

    An error is one paragraph on stderr that ends with its code, and exit code 2. If --json is given, stdout gets
    {"error": {"code": …, "message": …}} in one line too. Existing files are replaced when the new ones are complete;
    existing folders and results of long runs only with --overwrite.
    """


def run(arguments: Sequence[str] | None = None, *, received: Sequence[int] = ()) -> int:
    """Run the command line and return its exit code.

    That is 0; 1 if `infer-many` could not answer some queries; 2 for an error that the user can fix; 3 if `infer
    --exit-code` found nothing; 130 if interrupted. `received` lists the signals that interrupted the command; after one
    of them the code is 128 plus its number.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    configure_log(as_json="--log-json" in _options(given))
    try:
        code = app.main(args=given, prog_name="bridge-stg", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader of the events of `watch` has ended, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (click.Abort, KeyboardInterrupt):
        return _interrupted(given, received)
    except Exception as error:  # noqa: BLE001 - a bug is raised again
        if received:  # a consequence, such as a subprocess that the signal ended
            return _interrupted(given, received)
        if isinstance(error, click.ClickException) and type(error).__name__ == "NoArgsIsHelpError":  # of click 8.2
            click.echo(error.format_message(), err=True)  # the help
            return 2
        return _fail(given, *describe(error))


def describe(error: Exception) -> tuple[str, str]:
    """Return the code and the message of an error; raise it again if it is a bug."""
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" See '{context.command_path} --help'." if context else ""
        return next(code for kind, code in USAGE_CODES if isinstance(error, kind)), error.format_message() + hint
    if (found := host_error(error) or error) and isinstance(found, BridgeError):
        return found.code, found.message
    if isinstance(error, OSError):
        return "host.file", f"{error.filename or 'A file or standard output'}: {error.strerror or error}"
    package = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    for extra, packages in EXTRAS.items():
        if package and package in packages.split():
            message = f"This needs the package {package}. Install it: {install_command(*extra.split())}"
            return "host.missing_package", message
    raise error


def _interrupted(arguments: Sequence[str], received: Sequence[int]) -> int:
    """Write the error of an interruption, and return its exit code."""
    number = received[0] if received else signal.SIGINT
    return _fail(arguments, "call.cancelled", "Interrupted; no incomplete file was left.", exit_code=128 + number)


def _fail(arguments: Sequence[str], code: str, message: str, *, exit_code: int = 2) -> int:
    """Write an error as one line, so that a command in it can be copied, and with --json as JSON too."""
    text = " ".join(message.split())
    LOG.error("%s", text, extra={"code": code})
    if any(word.partition("=")[0] in ("--json", "--jsonl") for word in _options(arguments)):
        with contextlib.suppress(OSError):  # such as a full disk that stdout goes to
            click.echo(json.dumps({"error": {"code": code, "message": text}}))
    return exit_code


def _options(arguments: Sequence[str]) -> list[str]:
    """Return the arguments before `--`, after which none is an option."""
    return list(itertools.takewhile(lambda word: word != "--", arguments))


class _LossyStream(io.FileIO):
    """A standard stream that drops output after its reader has closed it, so that the command continues."""

    def write(self, data: Any) -> int:
        """Write bytes, and return their number."""
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def _open_streams(lossy: Collection[str]) -> None:
    """Open closed standard streams on the null device, since files would get their numbers; wrap those in `lossy`."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - until the exit
        elif name in lossy:
            raw = io.BufferedWriter(_LossyStream(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def _stop_on_signals() -> list[int]:
    """Handle the signals of STOPPING like Ctrl-C; return a list that gets the numbers of those received."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in STOPPING:
        if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` ignores SIGHUP
            signal.signal(number, stop)
    return received


def main() -> None:
    """Run the command line and exit."""
    if os.name == "posix":
        _open_streams(["stderr"] if sys.argv[1:2] == ["watch"] else ["stdout", "stderr"])
    received = _stop_on_signals()
    code = run(received=received)
    for number in (signal.SIGINT, *STOPPING):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)  # a second one during the exit would print a traceback
    try:
        sys.stdout.flush()
    except OSError:  # reported already; the interpreter would try again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if sys.argv[1:2] == ["infer"] and threading.active_count() == 1:
        # Everything is written and closed: a regular exit of the interpreter would only take time.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
