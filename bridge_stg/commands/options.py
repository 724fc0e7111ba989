"""Options, arguments and value types that several commands share, so that they are the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.cpus import MAX_THREADS

if TYPE_CHECKING:
    from bridge_stg.evaluation.sources.reading import Reading

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

DTYPES = ("fp32", "fp16", "bf16")
MB = 10**6
PATH = click.Path(path_type=Path)
MAX_COUNT = 2**31 - 1
THREADS = click.IntRange(min=1, max=MAX_THREADS)


class Count(click.IntRange):
    """An integer in a range. More than `MAX_COUNT` of anything is rejected: it would not fit the types of arrays."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the integer."""
        number: int = super().convert(value, param, ctx)
        if number > MAX_COUNT:
            self.fail(f"{value!s:.20} is too large; expected at most {MAX_COUNT}.", param, ctx)
        return number


COUNT = Count(min=1)


class Number(click.FloatRange):
    """A number in a range. NaN, which click accepts in every range, is rejected."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


class WindowLength(Number):
    """The length of a window in seconds, or one of the words `auto` and `whole`."""

    name = "window"

    def __init__(self) -> None:
        super().__init__(min=0.001)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the seconds or the word."""
        return value if value in ("auto", "whole") else super().convert(value, param, ctx)


SECONDS = Number(min=0.001)


adapter_option = click.option(
    "--adapter", metavar="NAME|PATH", help="LoRA adapter to merge; default: the only one in the folder, if any."
)


STDOUT = Path("-")


class OutputFile(click.Path):
    """A file to write: its suffix, if any is given, and its folder are checked before any work.

    With `stdout`, `-` is standard output.
    """

    def __init__(self, *suffixes: str, stdout: bool = False) -> None:
        super().__init__(dir_okay=False, allow_dash=stdout, path_type=Path)
        self.suffixes, self.stdout = suffixes, stdout

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path. Raises BridgeError if no file can be written there."""
        path = Path(value)
        if self.stdout and path == STDOUT:
            return path
        if path.is_dir():
            raise BridgeError("output.is_folder", f"{path} is a folder; expected the name of a file to write.")
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            expected = " or ".join(filter(None, (", ".join(self.suffixes[:-1]), self.suffixes[-1])))
            raise BridgeError("output.bad_suffix", f"{path} should end in {expected}.")
        if not path.parent.is_dir():
            raise BridgeError("output.no_folder", f"{path}: the folder {path.parent} does not exist. Create it first.")
        from bridge_stg.runtime.host.files import check_writable

        check_writable(path, path.parent)
        check_outside_bundles(path)
        return path


class OutputFolder(click.Path):
    """A folder to create, or one that exists: that it can be created is checked before any work."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path. Raises BridgeError if no folder can be created there."""
        from bridge_stg.runtime.host.files import check_creatable

        path = Path(value)
        check_creatable(path)
        check_outside_bundles(path)
        return path


def check_outside_bundles(path: Path) -> None:
    """Raise BridgeError if a path is in the folder of a bundle, which has files of its own only."""
    for folder in path.resolve().parents:
        if (folder / "manifest.json").is_file():
            from bridge_stg.runtime.bundle.writer import is_bundle

            if is_bundle(folder):
                raise BridgeError("output.is_input", f"{path} is in the bundle {folder}; choose another folder.")


def box(value: str) -> tuple[float, ...]:
    """Return left, top, right and bottom in pixels."""
    try:
        sides = tuple(float(side) for side in value.split(","))
    except ValueError:
        sides = ()
    if len(sides) != 4:
        what = "expected left,top,right,bottom in pixels, as in 10,20,60,80"
        raise click.BadParameter(f"{value!r} is not a box; {what}.")
    return sides


def shard(value: str) -> tuple[int, int]:
    """Return i and n of `i/n`: the i-th of n parts, counted from 1."""
    first, _, second = value.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise click.BadParameter(f"{value!r} is not a shard; expected i/n with 1 ≤ i ≤ n, such as 2/8.")
    return int(first), int(second)


def combine(*options: Decorator[Any]) -> Decorator[Any]:
    """Return a decorator that adds several options to a command."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def source_argument(name: str = "source", **options: Any) -> Decorator[Any]:
    """Return the argument of a video to read, for which a shell completes file names."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]

    return click.argument(name, shell_complete=complete, **options)


def _bytes_of_mb(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    return None if value is None else value * MB


bundle_argument = click.argument("bundle", type=PATH)
bundle_option = click.option("--bundle", type=PATH, help="Bundle; default: the demo bundle, exported if missing.")
backend_option = click.option("--backend", default="auto", show_default=True, help="Backend of the graphs; see doctor.")
threads_option = click.option("--threads", type=THREADS, help="CPU threads; default: the backend decides.")
seed_option = click.option("--seed", type=Count(min=0), default=0, show_default=True, help="Random seed.")
stream_option = click.option(
    "--stream", type=Count(min=0), metavar="N",
    help="Video stream to read, by its index in the file; default: the one that FFmpeg selects.",
)  # fmt: skip
visual_tokens_option = click.option(
    "--max-visual-tokens", type=COUNT,
    help="Maximum visual tokens per video; a longer video gets smaller frames, then a lower frame rate.",
)  # fmt: skip
index_size_option = click.option(
    "--index-mb", "max_index_bytes", type=COUNT, callback=_bytes_of_mb,
    help="Maximum MB of the index: the videos used longest ago are deleted from it; default: no maximum.",
)  # fmt: skip
index_option = combine(
    click.option(
        "--index", type=OutputFolder(), metavar="DIR",
        help="Folder in which visual tokens of videos are kept, so that the same footage is decoded and encoded once.",
    ),
    index_size_option,
)  # fmt: skip
search_options = combine(
    click.option(
        "--window", type=WindowLength(), default="auto", show_default=True, metavar="SECONDS|whole|auto",
        help="Search in windows of this length; whole: read the video at once; auto: search it if it is longer than a "
        "window of the bundle.",
    ),
    click.option(
        "--cuts/--no-cuts", default=True, show_default=True,
        help="Whether a search finds hard cuts, so that no window crosses one.",
    ),
    click.option(
        "--top", type=COUNT, metavar="K",
        help="Search every video, and return the best K occurrences per query; default: all of videos that are "
        "searched.",
    ),
)  # fmt: skip
allow_none_option = click.option(
    "--allow-none/--no-allow-none", default=True, show_default=True, help="Whether the target may be absent."
)
query_options = combine(
    click.option(
        "--task", type=click.Choice(["tube", "span", "image", "track"]),
        help="tube (the default): time span and boxes; span: time span only; image: one box in an image that shows the "
        "target; track: follow what is in --first-box, which implies it.",
    ),
    click.option(
        "--first-box", "--track", "first_box", type=box, metavar="L,T,R,B",
        help="Left, top, right and bottom, in pixels of the first frame, of what to track.",
    ),
    allow_none_option,
    visual_tokens_option,
    stream_option,
)  # fmt: skip

reading_options = combine(
    click.option(
        "--seconds", type=SECONDS, default=10.0, show_default=True, metavar="SECONDS",
        help="How much of a camera or live stream to read.",
    ),
    click.option(
        "--max-download-mb", type=COUNT, default=4096, show_default=True,
        help="Maximum MB of a download or of standard input.",
    ),
    click.option(
        "--stall", "stall_s", type=SECONDS, default=10.0, show_default=True, metavar="SECONDS",
        help="Fail if the source sends nothing for this time.",
    ),
)  # fmt: skip
text_queries_options = combine(
    click.option("--query", "texts", multiple=True, help="Query for each file; repeatable."),
    click.option(
        "--queries", "queries_file", type=click.Path(dir_okay=False, path_type=Path),
        help="Text file with one query per line, for each file.",
    ),
)  # fmt: skip


def chosen_task(task: str | None, first_box: Sequence[float] | None) -> str:
    """Return the task of `query_options`. Raises BridgeError for a first box without area, or for another task."""
    if first_box is not None and task not in (None, "track"):
        raise BridgeError(
            "options.conflict", f"--first-box is for --task track, not for {task}; leave out one of them."
        )
    if first_box is not None:
        from bridge_stg.runtime.chain.tasks import track_from

        track_from(first_box)
    return task or ("tube" if first_box is None else "track")


def check_search(task: str, window: float | str, *, cuts: bool, top: int | None, state: Path | None = None) -> None:
    """Raise BridgeError if there are options of a search, but the task or --window says that there is none."""
    if (isinstance(window, float) or state or top or not cuts) and (task in ("image", "track") or window == "whole"):
        text = "--window SECONDS, --top, --no-cuts and --state search a video"
        raise BridgeError(
            "options.conflict", f"{text}; leave them out with --task image, --task track and --window whole."
        )


def pop_reading(given: dict[str, Any]) -> Reading:
    """Remove the values of `reading_options` from `given`, and return them."""
    from bridge_stg.evaluation.sources.reading import Reading

    return Reading(given.pop("seconds"), given.pop("max_download_mb") * MB, given.pop("stall_s"))


def all_queries(texts: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Return the values of `text_queries_options` as one list. Raises BridgeError if the file has no query."""
    if file is None:
        return tuple(texts)
    from bridge_stg.evaluation.datasets.fields import numbered_lines

    if not file.exists():
        raise BridgeError("query.no_file", f"{file}: no such file; expected one with a query per line.")
    lines = [line.strip() for _, line in numbered_lines(file)]
    if not lines:
        raise BridgeError("query.empty", f"{file} has no query; expected one per line.")
    return (*texts, *lines)


def variant_option(default: str = "the one that fits this machine") -> Decorator[Any]:
    """Return the option `--variant`, whose help names the default."""
    return click.option("--variant", help=f"Variant of the graphs; default: {default}.")


def backend_options(*, variant: str = "the one that fits this machine") -> Decorator[Any]:
    """Return the options of commands that run graphs; `variant` is the default of `--variant` in words."""
    return combine(backend_option, variant_option(variant), threads_option)


kv_option = click.option(
    "--kv-mb", "kv_budget_bytes", type=COUNT, callback=_bytes_of_mb,
    help="Maximum MB of KV caches for the queries that run together; default: by the free memory of the device.",
)  # fmt: skip
heads_option = click.option(
    "--heads", type=click.Choice(["bridge", "text"]), help="Heads that answer; default: the bundle's own."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
text_options = combine(
    heads_option,
    click.option(
        "--mode", type=click.Choice(["auto", "joint", "two-step"]), default="auto", show_default=True,
        help="How text heads find a tube: all boxes in one answer, or the span first; auto: by the video's length.",
    ),
    click.option(
        "--grammar/--no-grammar", default=True, show_default=True,
        help="Whether answers of text heads are constrained to JSON.",
    ),
    click.option(
        "--max-tokens", type=COUNT, default=4096, show_default=True, help="Maximum tokens of an answer of text heads.",
    ),
)  # fmt: skip


def pop_head_options(given: dict[str, Any]) -> dict[str, Any]:
    """Remove the values of `text_options` from `given`, and return them as arguments of `Grounder.load`."""
    from bridge_stg.runtime import TextOptions

    text = TextOptions(**{name: given.pop(name) for name in ("mode", "grammar", "max_tokens")})
    return {"heads": given.pop("heads"), "text": text}


executor_options = combine(
    click.option(
        "--executor", "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
        help="Run the model in this process, or in many processes on Ray.",
    ),
    click.option("--workers", type=COUNT, help="Processes of --executor ray; default: one, or one per GPU."),
)  # fmt: skip
many_options = combine(
    executor_options,
    click.option("--overwrite", is_flag=True, help="Discard finished results and start again."),
    click.option("--retry-failed", is_flag=True, help="Retry samples that failed in an earlier run."),
    text_options,
    backend_options(),
)  # fmt: skip


def out_option(what: str) -> Decorator[Any]:
    """Return the option `--out` for a new folder."""
    return click.option("--out", type=OutputFolder(), required=True, help=f"Folder to create for {what}.")


def overwrite_option(what: str) -> Decorator[Any]:
    """Return the option `--overwrite` for files that a command makes."""
    return click.option("--overwrite", is_flag=True, help=f"Replace an existing {what}.")


def sample_options(*, required: bool) -> Decorator[Any]:
    """Return the options that name the samples of a calibration."""
    return combine(
        click.option("--samples", type=PATH, required=required, help="JSON lines: samples for activation statistics."),
        click.option("--media", type=PATH, help="Folder of their videos and images; default: that of each file."),
        click.option("--select", type=PATH, help="Labelled JSON lines that decide which blocks stay in float."),
        click.option("--evaluate", type=PATH, help="Labelled JSON lines on which the final bundle is scored."),
    )
