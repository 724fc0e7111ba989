"""The commands `infer` (check the options, run the model, write the results) and `ask` (stream an answer in text)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, SECONDS, box, output_file
from bridge_stg.commands.progress import (
    ProgressBar,
    note_missing_letters,
    note_unknown_words,
    note_untrained,
    stage_line,
    untrained_text,
)
from bridge_stg.runtime.errors import BridgeError, BundleError

if TYPE_CHECKING:
    from bridge_stg.runtime.backends.choose import ChosenBackend
    from bridge_stg.runtime.chain.results import Grounding

BACKEND_OPTIONS = ("backend", "variant", "threads")
UNVERIFIED = (
    "Note: this bundle is unverified: it was exported with --no-verify, so its graphs were never compared with torch."
)
deadline_option = click.option("--deadline", type=SECONDS, metavar="SECONDS", help="Stop after this time.")


@dataclass(frozen=True)
class Request:
    """The arguments and options of `infer`."""

    video: str
    queries: tuple[str, ...]
    task: str
    first_box: tuple[float, ...] | None
    bundle: Path | None
    json_file: Path | None
    annotate: Path | None
    sheet: Path | None
    allow_none: bool
    heads: str | None
    mode: str
    grammar: bool
    max_tokens: int
    backend_options: Mapping[str, Any]  # arguments of `Grounder.load`
    max_visual_tokens: int | None
    stream: int | None
    deadline: float | None
    untrained: bool

    @property
    def outputs(self) -> list[Path]:
        """Return the files to write."""
        return [path for path in (self.json_file, self.annotate, self.sheet) if path is not None]


@click.command()
@click.argument("video")
@click.argument("queries", metavar="QUERY...", nargs=-1)
@options.query_options
@click.option("--track", "first_box", type=box, metavar="L,T,R,B", help="Track the object in this box of frame 1.")
@options.bundle_option
@click.option("--json", "json_file", type=output_file(".json"), help="Write the results, one box per video frame.")
@click.option(
    "--annotate",
    type=output_file(".mp4", ".png", ".jpg"),
    help="Write the video (H.264) or image with the boxes of all queries.",
)
@click.option("--sheet", type=output_file(".png"), help="Write a contact sheet of the spans and a timeline.")
@options.text_options
@options.backend_options()
@deadline_option
@click.option("--untrained", is_flag=True, help="Run a bundle whose bridging and spatial parts were never trained.")
def infer(**given: Any) -> None:
    """Find QUERY in VIDEO (or in an image): the time span, and a box in every frame of it.

    The video is processed once for all queries. With --track, QUERY is optional.
    """
    request = Request(backend_options={name: given.pop(name) for name in BACKEND_OPTIONS}, **given)
    check(request)
    with ProgressBar(delay_s=1) as progress:
        results, chosen = ground(request, progress)
        write(request, results, chosen, progress)
    from bridge_stg.commands.tables import grounding_table

    click.echo("\n\n".join(grounding_table(result) for result in results))
    if chosen is not None:
        click.echo(f"  backend: {chosen.summary}")
    for path in request.outputs:
        click.echo(f"wrote {path}")


def check(request: Request) -> None:
    """Raise BridgeError for what click does not check: options that exclude each other, and files named twice."""
    drawn = request.annotate or request.sheet
    if request.first_box is None and not request.queries:
        raise BridgeError("options.missing", "Missing argument 'QUERY...': what to find, such as \"the red car\".")
    if request.first_box is not None and (request.task != "tube" or len(request.queries) > 1):
        raise BridgeError("options.conflict", "--track takes at most one QUERY and no --task; leave out the others.")
    if request.task == "span" and drawn:
        raise BridgeError("options.conflict", "--task span computes no boxes; leave out --annotate and --sheet.")
    for output in request.outputs:
        if output.exists() and Path(request.video).exists() and output.samefile(request.video):
            raise BridgeError("output.is_input", f"{output} is the video itself; give another name for the output.")
    if request.annotate and request.sheet and request.annotate.resolve() == request.sheet.resolve():
        raise BridgeError("options.conflict", f"{request.sheet} is both --annotate and --sheet; give two names.")


def ground(request: Request, progress: ProgressBar) -> tuple[Sequence[Grounding], ChosenBackend | None]:
    """Run the model, and return the result of each query and the backend that computed it."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # idle threads of numpy would busily wait for work
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.host.threads import in_background

    began = time.monotonic()
    if request.annotate:
        from bridge_stg.runtime.video.playback import play
        from bridge_stg.runtime.visualize.annotate import check_suffix

        with play(request.video, request.stream) as source:  # a wrong suffix fails now, not after the work
            check_suffix(source, request.annotate)
    path = request.bundle or demo_bundle(progress=stage_line)
    load_options = {**request.backend_options, **options.pop_head_options(dataclasses.asdict(request))}
    loading = in_background(lambda: Grounder.load(path, wait=False, **load_options))
    for module in ("av", "PIL.Image", "bridge_stg.runtime.video.file"):  # a missing one is reported when it is used
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    from bridge_stg.runtime.chain.tasks import TRACKED

    with loading.result() as grounder:
        if not grounder.verified:
            click.echo(UNVERIFIED, err=True)
        heads = grounder.heads
        if not request.untrained and not grounder.spec.is_trained(heads):
            other = "" if grounder.spec.text is None else ", use its text heads (--heads text)"
            advice = f"Train its checkpoint (`train`) and export it again{other}, or pass --untrained to run it anyway."
            raise BundleError("bundle.untrained", f"{untrained_text(path)} {advice}")
        note_untrained(grounder.spec, path, heads=heads)
        note_unknown_words(grounder.spec, request.queries)
        limits: dict[str, Any] = {"deadline_s": request.deadline, "progress": progress}
        tokens = request.max_visual_tokens
        with grounder.open(request.video, max_visual_tokens=tokens, stream=request.stream, **limits) as video:
            if request.deadline is not None:
                limits["deadline_s"] = max(0.0, request.deadline - (time.monotonic() - began))
            queries = list(request.queries)
            if request.first_box is not None:
                results = [video.track(request.first_box, query=queries[0] if queries else TRACKED, **limits)]
            elif request.task == "span":
                results = [video.span(query, allow_none=request.allow_none, **limits) for query in queries]
            elif request.task == "image":
                results = [video.locate(query, **limits) for query in queries]
            else:
                results = video.ground_many(queries, allow_none=request.allow_none, **limits)
        return results, grounder.target


def write(request: Request, results: Sequence[Grounding], chosen: ChosenBackend | None, progress: ProgressBar) -> None:
    """Write the files that were requested, each whole or not at all."""
    if request.json_file:
        from bridge_stg.runtime.host.files import replacing

        engine = None if chosen is None else chosen.to_json()
        document = {"video": request.video, "engine": engine, "results": [result.to_json() for result in results]}
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        with replacing(request.json_file) as temporary:
            # Bytes of a file name that are not Unicode are escaped as JSON escapes them.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    if request.annotate or request.sheet:
        from bridge_stg.runtime.visualize.annotate import annotate
        from bridge_stg.runtime.visualize.contact_sheet import contact_sheet

        note_missing_letters(request.queries)
        if request.annotate:
            annotate(request.video, results, request.annotate, progress=progress)
        if request.sheet:
            contact_sheet(request.video, results, request.sheet)


@click.command()
@click.argument("video")
@click.argument("question")
@options.bundle_option
@click.option("--max-tokens", type=COUNT, default=512, show_default=True, help="Maximum tokens of the answer.")
@options.visual_tokens_option
@options.stream_option
@options.backend_options()
@deadline_option
def ask(
    *, video: str, question: str, bundle: Path | None, max_tokens: int, max_visual_tokens: int | None,
    stream: int | None, deadline: float | None, **backend: Any,
) -> None:  # fmt: skip
    """Ask a QUESTION about VIDEO (or an image), and print the answer while the model writes it.

    The bundle must answer in text (docs/text_heads.md). Decoding is greedy.
    """
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.runtime import Grounder

    path = bundle or demo_bundle(progress=stage_line)
    with Grounder.load(path, **backend) as grounder:
        if not grounder.verified:
            click.echo(UNVERIFIED, err=True)
        pieces = grounder.ask(
            video, question, max_tokens=max_tokens, max_visual_tokens=max_visual_tokens, stream=stream,
            deadline_s=deadline,
        )  # fmt: skip
        for piece in pieces:
            click.echo(piece, nl=False)  # which also flushes
    click.echo()
