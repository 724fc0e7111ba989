"""What commands write to stderr: log records, progress bars, lines for the stages of a long command, and notes."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tqdm import tqdm

    from bridge_stg.runtime.bundle.spec import ModelSpec


T = TypeVar("T")
SHOWN_WORDS = 10
"""Maximum words in the note about unknown words."""
SHOWN_LETTERS = 20
REFRESH_S = 0.5
"""Seconds after which the time of a bar is written again, although nothing new is done."""
LOG = logging.getLogger("bridge_stg.commands")


class LogHandler(logging.Handler):
    """Writes each record as a line on stderr: its text, or with `as_json` a JSON object."""

    as_json = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; errors of commands have a `code`."""
        code, message = getattr(record, "code", None), record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        if self.as_json:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
            values = {"time": stamp, "level": record.levelname.lower(), "logger": record.name}
            values |= {"message": message.strip()} | ({"code": code} if code else {})
            message = json.dumps(values, ensure_ascii=False)
        elif code:
            message = f"Error: {message} [{code}]"
        click.echo(message, err=True)


HANDLER = LogHandler()


def configure_log(*, as_json: bool = False) -> None:
    """Write the log records of this process to stderr: those of commands from INFO, all others from WARNING."""
    HANDLER.as_json = as_json
    logging.getLogger().addHandler(HANDLER)
    logging.captureWarnings(as_json)
    set_level(logging.INFO)


def set_level(level: int) -> None:
    """Set the lowest level of records of commands that are written, and show bars only from INFO downwards."""
    LOG.setLevel(level)
    logging.getLogger("bridge_stg").setLevel(logging.WARNING if level == logging.INFO else level)


def log_options(command: Any) -> Any:
    """Add `-v`, `-q` and `--log-json` to a command; `--log-json` is read by `bridge_stg.cli` before all others."""

    def sets(level: int) -> Callable[..., None]:
        return lambda ctx, param, value: set_level(level) if value else None

    given: dict[str, Any] = {"is_flag": True, "expose_value": False}
    for option in (
        click.option("-v", "--verbose", callback=sets(logging.DEBUG), help="Log details on stderr.", **given),
        click.option("-q", "--quiet", callback=sets(logging.ERROR), help="Write only errors to stderr.", **given),
        click.option("--log-json", help="Write each line of stderr as a JSON object.", **given),
    ):
        option(command)
    return command


class ProgressBar:
    """A progress bar on stderr for each stage in turn; a context manager, which closes the last one.

    No bar is shown in the first `delay_s` seconds, so that a short command shows none. With a `unit` of the count,
    finished bars stay on the screen. Where no bars are shown (stderr is no terminal, or `-q` or `--log-json` is given),
    the name of each stage is logged: with `lines` at the level INFO, else DEBUG.
    """

    def __init__(self, *, delay_s: float = 0, unit: str = "", lines: bool = False) -> None:
        self._from, self._unit, self._lines = time.time() + delay_s, unit, lines
        self._shown = sys.stderr.isatty() and LOG.isEnabledFor(logging.INFO) and not HANDLER.as_json
        self._stage: str | None = None
        self._done: float = 0
        self._total: float | None = None
        self._logged: set[str] = set()
        self._bar: tqdm[Any] | None = None
        self._starts: dict[str, tuple[float, float]] = {}  # stage → when it began, and what was done then
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._ticker: threading.Thread | None = None

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        """Show that `done` of `total` units of a stage are finished; `total` is None if it is unknown."""
        if stage != self._stage:
            self.close()
            if not self._shown and stage not in self._logged:  # some alternate, such as decoding and the vision encoder
                self._logged.add(stage)
                LOG.log(logging.INFO if self._lines else logging.DEBUG, "  %s", stage)
        with self._lock:
            if stage not in self._starts or done <= self._starts[stage][1]:  # for the first time, or for another video
                self._starts[stage] = time.time(), done
            self._stage, self._done, self._total = stage, done, total
            self._draw()

    def wait(self, stage: str, future: Future[T]) -> T:
        """Show a stage of unknown length until a future is done, and return its result."""
        self(stage, 0)
        return future.result()

    def _draw(self) -> None:
        """Write the state of the stage, in a new bar if it has none."""
        if not self._shown or self._stage is None or time.time() < self._from:
            return
        if self._bar is None:
            from tqdm import tqdm

            # What was done in an earlier run took no time of this one: `initial` keeps it out of the estimate.
            options: dict[str, Any] = {"unit": self._unit, "leave": True}
            if not self._unit:
                bar, count = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}", "{n:.0f} " if self._done else ""
                options = {"bar_format": "{desc}: " + (bar if self._total else count + "{elapsed}"), "leave": False}
            began, initial = self._starts[self._stage]
            self._bar = tqdm(desc=self._stage.replace("_", " "), total=self._total, initial=initial, **options)
            self._bar.start_t, self._bar.n = began, self._done
            self._bar.refresh()
        self._bar.update(self._done - self._bar.n)

    def _refresh(self) -> None:
        """Write the bar again while nothing is reported, as in a stage that waits for the model to be loaded."""
        while not self._ended.wait(REFRESH_S):
            with self._lock:
                self._draw()
                if self._bar is not None:
                    self._bar.refresh()

    def close(self) -> None:
        """Close the bar that is shown."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = self._stage = None

    def __enter__(self) -> ProgressBar:
        if self._shown:
            self._ticker = threading.Thread(target=self._refresh, name="bridge-stg-progress", daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._ticker is not None:
            self._ticker.join()
        self.close()


def stage_line(stage: object, *_: object) -> None:
    """Write the name of a stage as a line on stderr."""
    LOG.info("  %s", stage)


def untrained_text(name: object) -> str:
    """Return the sentence about a bundle or checkpoint whose bridging and spatial parts were never trained."""
    return f"{name} is untrained: its bridging and spatial parts are random, so its answers mean nothing."


def note_untrained(spec: ModelSpec | None, name: object, *, heads: str | None = None) -> None:
    """Write a line if the heads that answer, by default those of the spec, were never trained."""
    if spec and not spec.is_trained(heads):
        LOG.warning("Note: %s", untrained_text(name))


def note_unknown_words(spec: ModelSpec | None, queries: Iterable[str]) -> None:
    """Write a line if queries have words that the model does not know."""
    if spec is None or spec.knows is None:
        return
    if words := list(dict.fromkeys(word for query in queries for word in spec.unknown_words(query))):
        more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
        shown = f"{', '.join(words[:SHOWN_WORDS])}{more}"
        LOG.warning("Note: words that the model does not know: %s. %s", shown, spec.knows.summary)


def note_missing_letters(queries: Iterable[str]) -> None:
    """Write a line if pictures cannot show letters of the queries, since no installed font has them."""
    from bridge_stg.runtime.visualize.fonts import missing_letters

    if letters := "".join(dict.fromkeys("".join(map(missing_letters, queries)))):
        shown = letters if len(letters) <= SHOWN_LETTERS else f"{letters[:SHOWN_LETTERS]}…"
        instead = "pictures show ? or the query's number instead. Install one, such as the Noto fonts."
        LOG.warning("Note: no font on this system has the letters %s: %s", shown, instead)
