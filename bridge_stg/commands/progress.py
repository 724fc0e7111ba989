"""What commands write to stderr: progress bars, lines for the stages of a long command, and notes about the model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

    from bridge_stg.runtime.bundle.spec import ModelSpec

SHOWN_LETTERS = 20
SHOWN_WORDS = 10
"""Maximum words in the note about unknown words."""


class ProgressBar:
    """A progress bar on stderr for each stage in turn; a context manager, which closes the last one.

    A stage must take `delay_s` seconds before its bar is shown. With a `unit` of the count, finished bars stay on the
    screen. Where stderr is not a terminal, `lines` writes the name of each stage as a line; otherwise nothing is shown.
    """

    def __init__(self, *, delay_s: float = 0, unit: str = "", lines: bool = False) -> None:
        self._delay_s, self._unit, self._lines = delay_s, unit, lines
        self._shown = sys.stderr.isatty()
        self._stage: str | None = None
        self._bar: tqdm[Any] | None = None

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        """Show that `done` of `total` units of a stage are finished; `total` is None if it is unknown."""
        if stage != self._stage:
            self.close()
            self._stage = stage
            if self._shown:
                from tqdm import tqdm

                # What was done in an earlier run took no time of this one: `initial` keeps it out of the estimate.
                options: dict[str, Any] = {"unit": self._unit, "leave": True}
                if not self._unit:
                    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
                    options = {"bar_format": form if total else "{desc}: {n:.0f} {elapsed}", "leave": False}
                self._bar = tqdm(desc=stage, total=total, initial=done, delay=self._delay_s, **options)
            elif self._lines:
                stage_line(stage)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Close the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def stage_line(stage: object, *_: object) -> None:
    """Write the name of a stage as a line on stderr."""
    click.echo(f"  {stage}", err=True)


def untrained_text(name: object) -> str:
    """Return the sentence about a bundle or checkpoint whose bridging and spatial parts were never trained."""
    return f"{name} is untrained: its bridging and spatial parts are random, so its answers mean nothing."


def note_untrained(spec: ModelSpec | None, name: object, *, heads: str | None = None) -> None:
    """Write a line if the heads that answer, by default those of the spec, were never trained."""
    if spec and not spec.is_trained(heads):
        click.echo(f"Note: {untrained_text(name)}", err=True)


def note_unknown_words(spec: ModelSpec | None, queries: Iterable[str]) -> None:
    """Write a line if queries have words that the model does not know."""
    if spec is None or spec.knows is None:
        return
    if words := list(dict.fromkeys(word for query in queries for word in spec.unknown_words(query))):
        more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
        shown = f"{', '.join(words[:SHOWN_WORDS])}{more}"
        click.echo(f"Note: words that the model does not know: {shown}. {spec.knows.summary}", err=True)


def note_missing_letters(queries: Iterable[str]) -> None:
    """Write a line if pictures cannot show letters of the queries, since no installed font has them."""
    from bridge_stg.runtime.visualize.fonts import missing_letters

    if letters := "".join(dict.fromkeys("".join(map(missing_letters, queries)))):
        shown = letters if len(letters) <= SHOWN_LETTERS else f"{letters[:SHOWN_LETTERS]}…"
        instead = "pictures show ? or the query's number instead. Install one, such as the Noto fonts."
        click.echo(f"Note: no font on this system has the letters {shown}: {instead}", err=True)
