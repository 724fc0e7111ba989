"""The files that `infer` writes: JSON, JSON lines, drawings. And the command `schema`, which describes their JSON."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import STDOUT, OutputFile
from bridge_stg.commands.progress import LOG, ProgressBar, note_missing_letters
from bridge_stg.runtime.errors import BridgeError

if TYPE_CHECKING:
    from bridge_stg.evaluation.sources.sources import Source
    from bridge_stg.runtime import Grounder, SearchResult
    from bridge_stg.runtime.chain.results import Grounding

Append = Callable[[Mapping[str, Any]], None]

output_options = options.combine(
    click.option(
        "--json", "json_file", type=OutputFile(".json", stdout=True),
        help="Write the results of one source, one box per video frame; -: to stdout.",
    ),
    click.option(
        "--jsonl", "jsonl_file", type=OutputFile(".jsonl", stdout=True),
        help="Append a JSON line per source and query; -: to stdout.",
    ),
    click.option(
        "--annotate", type=OutputFile(".mp4", ".png", ".jpg"),
        help="Write the video (H.264) or image with the boxes of all queries.",
    ),
    click.option("--sheet", type=OutputFile(".png"), help="Write a contact sheet of the spans and a timeline."),
)  # fmt: skip


@dataclass(frozen=True)
class Outputs:
    """The values of `output_options`."""

    json_file: Path | None
    jsonl_file: Path | None
    annotate: Path | None
    sheet: Path | None

    @classmethod
    def pop(cls, given: dict[str, Any]) -> Outputs:
        """Remove the values of `output_options` from `given`, and return them."""
        return cls(*(given.pop(name) for name in ("json_file", "jsonl_file", "annotate", "sheet")))

    @property
    def paths(self) -> list[Path]:
        """Return the files to write."""
        paths = (self.json_file, self.jsonl_file, self.annotate, self.sheet)
        return [path for path in paths if path is not None and path != STDOUT]

    @property
    def to_stdout(self) -> bool:
        """Return whether stdout gets JSON, and nothing else."""
        return STDOUT in (self.json_file, self.jsonl_file)

    @property
    def search_state(self) -> Path | None:
        """Return the file beside the results for a search that is under way; None without such results."""
        if self.json_file is None or self.json_file == STDOUT:
            return None
        return self.json_file.with_name(f"{self.json_file.name}.search.jsonl")

    def check(self, sources: Sequence[Source], *, stream: int | None, state: Path | None = None) -> None:
        """Raise BridgeError if two outputs are the same, one is an input, or one cannot be written as it is named.

        `state` is the file of a search that is under way; None: `search_state`.
        """
        if self.json_file == self.jsonl_file == STDOUT:
            raise BridgeError("options.conflict", "--json and --jsonl both write to stdout; leave one out.")
        named = {"--json": self.json_file, "--jsonl": self.jsonl_file, "--annotate": self.annotate}
        named |= {"--sheet": self.sheet, "--state": state or self.search_state}
        seen: dict[Path, str] = {}
        for option, path in named.items():
            if path is None or path == STDOUT:
                continue
            if (other := seen.setdefault(path.resolve(), option)) != option:
                raise BridgeError("options.conflict", f"{path} is both {other} and {option}; give two names.")
        for output in self.paths:
            if any(output.exists() and os.path.exists(one.word) and output.samefile(one.word) for one in sources):
                raise BridgeError("output.is_input", f"{output} is the video itself; give another name for the output.")
        if self.jsonl_file and self.jsonl_file != STDOUT:
            from bridge_stg.runtime.host.files import check_lines

            check_lines(self.jsonl_file)
        if len(sources) == 1 and sources[0].kind == "file":
            self.check_drawing(sources[0].word, stream)  # fails now, not after the work

    def check_drawing(self, path: str, stream: int | None) -> None:
        """Raise BridgeError if the suffix of `--annotate` does not fit the video or image."""
        if self.annotate:
            from bridge_stg.runtime.video.playback import play
            from bridge_stg.runtime.visualize.annotate import check_suffix

            with play(path, stream) as source:
                check_suffix(source, self.annotate)

    def write(
        self, source: Source, path: str, results: Sequence[Grounding | SearchResult], *, grounder: Grounder,
        recorded: Mapping[str, Any], progress: ProgressBar,
    ) -> None:  # fmt: skip
        """Write the files about one source, each whole or not at all.

        Args:
            source: the video or image.
            path: its local file.
            results: the result of each query.
            grounder: the model.
            recorded: the options that may change the answers.
            progress: the bar of the annotated video.
        """
        from bridge_stg.runtime.chain.results import Grounding, origin_json

        if self.json_file:
            origin = origin_json(
                bundle=grounder.bundle, engine=grounder.target, source=source.name, options=dict(recorded)
            )
            document = {**origin, "results": [result.to_json() for result in results]}
            write_text(self.json_file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        if self.annotate or self.sheet:
            note_missing_letters([result.query for result in results])
        if self.annotate:
            from bridge_stg.runtime.visualize.annotate import annotate

            drawn = [one if isinstance(one, Grounding) else one.drawn for one in results]
            annotate(path, drawn, self.annotate, progress=progress)
        if self.sheet:
            from bridge_stg.runtime.visualize.contact_sheet import contact_sheet

            contact_sheet(path, [one if isinstance(one, Grounding) else one.best for one in results], self.sheet)


@contextlib.contextmanager
def json_lines(path: Path | None, *, overwrite: bool = False) -> Iterator[Append]:
    """Yield a function that appends a value to a file, or to stdout, as one line; without a path, it does nothing."""
    if path is None:
        yield lambda value: None
    elif path == STDOUT:
        yield lambda value: write_text(STDOUT, json.dumps(value, ensure_ascii=False) + "\n")
    else:
        from bridge_stg.runtime.host.files import LineFile

        in_use = f"{path}: another process appends to this file; give another --jsonl."
        with LineFile(path, in_use=in_use, overwrite=overwrite, durable=False) as file:
            if file.repaired:
                LOG.warning("Note: %s ended in an incomplete line, which was removed.", path)
            yield file.append


def write_text(path: Path, text: str) -> None:
    """Write a text to stdout, or replace a file; bytes of file names that are not Unicode are escaped as in JSON."""
    if path == STDOUT:
        click.echo(text.encode("utf-8", errors="backslashreplace"), nl=False)
        return
    from bridge_stg.runtime.host.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@click.command()
@click.argument("name", default="document")
@click.option("--markdown", is_flag=True, help="Print the tables of docs/results.md instead.")
def schema(name: str, markdown: bool) -> None:
    """Print the JSON schema of what commands and the server write.

    NAME is `document` (infer --json, the default), `result`, `table_row` (infer-many), `watch_line`, or another part
    that docs/results.md describes.
    """
    from bridge_stg.evaluation import schema as results

    click.echo(results.tables() if markdown else json.dumps(results.schema(name), indent=1, ensure_ascii=False))
