"""Progress of the commands on stderr: bars on a terminal, and lines for the stages of a long command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm


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
