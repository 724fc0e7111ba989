"""The command `watch`: standing queries on a live stream, events as lines of text."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import SECONDS, Number, OutputFile
from bridge_stg.commands.progress import LOG, note_unknown_words, note_untrained, stage_line
from bridge_stg.commands.results import Append, json_lines
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import check_lines
from bridge_stg.runtime.live.events import wall_json

if TYPE_CHECKING:
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.live.stats import LiveStats

EVERY_NOTE = (
    "Note: --every %g is shorter than a group of coarse frames (%g s), within which nothing new is known: a round "
    "follows each group."
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@click.command()
@options.source_argument()
@click.argument("queries", metavar="QUERY...", nargs=-1, required=True)
@options.bundle_option
@click.option(
    "--every", "every_s", type=SECONDS, default=1.0, show_default=True, metavar="SECONDS",
    help="Seconds between two rounds.",
)  # fmt: skip
@click.option(
    "--window", "window_s", type=SECONDS, metavar="SECONDS",
    help="Newest seconds that a round sees; default: 16, or what the model reads at once.",
)  # fmt: skip
@click.option("--jsonl", "--json", "json_file", type=OutputFile(), help="Append the events, one JSON object per line.")
@click.option("--answers", is_flag=True, help="Write every round's answers to --jsonl too.")
@options.overwrite_option("--jsonl file")
@click.option("--realtime", is_flag=True, help="Play a file at its own pace instead of as fast as possible.")
@click.option("--duration", "duration_s", type=SECONDS, metavar="SECONDS", help="Stop after this much stream time.")
@click.option("--deadline", "deadline_s", type=SECONDS, metavar="SECONDS", help="Stop a round after this time.")
@click.option(
    "--stall", "stall_s", type=SECONDS, default=10.0, show_default=True, metavar="SECONDS",
    help="Fail if the source sends nothing for this time.",
)  # fmt: skip
@click.option(
    "--moved-iou", type=Number(0, 1), default=0.5, show_default=True, metavar="IOU",
    help="Report `moved` if the IoU with the box reported last is below this.",
)  # fmt: skip
@options.allow_none_option
@options.text_options
@options.backend_options()
@options.kv_option
def watch(
    *, source: str, queries: tuple[str, ...], bundle: Path | None, json_file: Path | None, answers: bool,
    overwrite: bool, realtime: bool, threads: int | None, backend: str, variant: str | None,
    kv_budget_bytes: int | None, **given: Any,
) -> None:  # fmt: skip
    """Watch SOURCE for each QUERY, and print when its target appears, moves and leaves.

    SOURCE is a video file, an address such as rtsp://camera/stream, or a camera such as /dev/video0 or 0. Ctrl-C or
    SIGTERM stops the watch gracefully.
    """
    if answers and json_file is None:
        raise BridgeError("options.conflict", "--answers needs --jsonl, the file to write answers to; add it.")
    _check_output(json_file, source, overwrite=overwrite)
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.chain.results import origin_json
    from bridge_stg.runtime.host.memory import return_freed_memory

    return_freed_memory()  # a watch runs for days, and its memory should not grow
    recorded = {
        "realtime": realtime, "backend": backend, "variant": variant, "threads": threads,
        **given,
    }  # fmt: skip
    head_options = options.pop_head_options(given)
    path = bundle or demo_bundle(progress=stage_line)
    with (
        stopped_by_signals() as stop,
        Grounder.load(
            path, backend=backend, variant=variant, threads=threads, kv_budget_bytes=kv_budget_bytes, **head_options
        ) as grounder,
        warmed_up(grounder).watch(source, queries, realtime=realtime, cancel=stop, **given) as watch,
        json_lines(json_file, overwrite=overwrite) as append,
    ):
        log = stamped(append)
        note_untrained(grounder.spec, path, heads=grounder.heads)
        note_unknown_words(grounder.spec, queries)
        origin = origin_json(bundle=grounder.bundle, engine=grounder.target, source=watch.source.name, options=recorded)
        log({"event": "start", "queries": queries, **origin})
        try:
            for number, update in enumerate(watch):
                if number == 0 and (round_s := watch.stats.round_s) > given["every_s"]:
                    LOG.warning(EVERY_NOTE, given["every_s"], round_s)
                for event in update.events:
                    box = ",".join(f"{side:.0f}" for side in event.box)
                    at = (event.wall_time or update.wall_time).astimezone()
                    click.echo(f"{at:%Y-%m-%d %H:%M:%S}  {clock(event.time_s)}  {event.kind:8}  {event.query}  [{box}]")
                    log(event.to_json())
                if answers:
                    log({"event": "answers", **update.to_json()})
        finally:
            stats = watch.stats
            log({"event": "end", **stats.to_json()})
            if stats.frames:
                LOG.info("%s", summary(stats))


def warmed_up(grounder: Grounder) -> Grounder:
    """Warm a model up before a source is opened, which would not wait; return the model."""
    grounder.warm_up()
    return grounder


def _check_output(file: Path | None, source: str, *, overwrite: bool) -> None:
    if file is None or not file.exists():
        return
    if Path(source).exists() and file.samefile(source):
        raise BridgeError("output.is_input", f"{file} is the source itself; give another name for --jsonl.")
    if not overwrite:
        check_lines(file)


def stamped(append: Append) -> Append:
    """Return a function that appends an event as a line, and gives one without `wall_time` the time of writing."""
    return lambda value: append({"event": value["event"], "wall_time": wall_json(datetime.now(timezone.utc)), **value})


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set; another signal has its usual effect."""
    stop = threading.Event()
    with ExitStack() as before:

        def handle(number: int, _: object) -> None:
            stop.set()
            before.close()

        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before.callback(signal.signal, number, signal.signal(number, handle))
        yield stop


def clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds, 2), 60)
    return f"{int(minutes) // 60:02}:{int(minutes) % 60:02}:{rest:05.2f}"


def summary(stats: LiveStats) -> str:
    """Summarize a watch in three lines."""
    rebuilds = f"{stats.rebuilds} {'rebuild' if stats.rebuilds == 1 else 'rebuilds'}"
    longest = f" the longest of {rebuilds} {1000 * stats.longest_rebuild_s:.0f} ms," if stats.rebuilds else ""
    return (
        f"{stats.frames} frames, {stats.answers} rounds; ended: {stats.ended}. Dropped: {stats.dropped_coarse_frames} "
        f"coarse frames, {stats.skipped_answers + stats.late_answers} rounds.\n"
        f"A coarse frame took {1000 * stats.cost_s:.1f} ms,{longest} "
        f"the longest round {1000 * stats.longest_answer_s:.0f} ms.\n"
        f"Latency from a frame to its answers: median {1000 * stats.latency_median_s:.0f} ms, 95th percentile "
        f"{1000 * stats.latency_p95_s:.0f} ms."
    )
