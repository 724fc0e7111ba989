"""The commands `infer` (check the options, run the model, write the results) and `ask` (stream an answer in text)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, SECONDS, STDOUT, OutputFile, box
from bridge_stg.commands.progress import (
    LOG,
    ProgressBar,
    note_missing_letters,
    note_unknown_words,
    note_untrained,
    stage_line,
    untrained_text,
)
from bridge_stg.runtime.errors import BridgeError, BundleError, EngineError, QueryError, VideoError

if TYPE_CHECKING:
    from bridge_stg.evaluation.sources.download import Reading
    from bridge_stg.evaluation.sources.sources import Source
    from bridge_stg.runtime import Grounder, SearchResult
    from bridge_stg.runtime.backends.choose import ChosenBackend
    from bridge_stg.runtime.chain.results import Grounding

BACKEND_OPTIONS = ("backend", "variant", "threads")
RECORDED = (
    "task", "first_box", "allow_none", "heads", "mode", "grammar", "max_tokens", "max_visual_tokens", "stream",
)  # fmt: skip
"""Options that may change the answers, and are recorded with them."""
UNVERIFIED = (
    "Note: this bundle is unverified: it was exported with --no-verify, so its graphs were never compared with torch."
)
deadline_option = click.option("--deadline", type=SECONDS, metavar="SECONDS", help="Stop after this time.")


@dataclass(frozen=True)
class Request:
    """The arguments and options of `infer`."""

    words: tuple[str, ...]  # that name the sources
    queries: tuple[str, ...]
    task: str
    first_box: tuple[float, ...] | None
    bundle: Path | None
    json_file: Path | None
    jsonl_file: Path | None
    annotate: Path | None
    sheet: Path | None
    allow_none: bool
    index: Path | None
    heads: str | None
    mode: str
    grammar: bool
    max_tokens: int
    backend_options: Mapping[str, Any]  # arguments of `Grounder.load`
    max_visual_tokens: int | None
    stream: int | None
    deadline: float | None
    untrained: bool
    window: float | str  # seconds, `whole` or `auto`
    top: int | None
    state: Path | None
    reading: Reading
    began: float = field(default_factory=time.monotonic)

    @property
    def search_state(self) -> Path | None:
        """Return the file of a search that is under way: --state, else beside the results."""
        if self.state or self.json_file in (None, STDOUT):
            return self.state
        assert self.json_file is not None
        return self.json_file.with_name(f"{self.json_file.name}.search.jsonl")

    @property
    def outputs(self) -> list[Path]:
        """Return the files to write."""
        paths = (self.json_file, self.jsonl_file, self.annotate, self.sheet)
        return [path for path in paths if path is not None and path != STDOUT]

    @property
    def recorded(self) -> dict[str, Any]:
        """Return the options that may change the answers, by name."""
        values = {name: getattr(self, name) for name in RECORDED} | dict(self.backend_options)
        return values if self.first_box is None else {**values, "task": "track"}

    @property
    def to_stdout(self) -> bool:
        """Return whether stdout gets JSON, and nothing else."""
        return STDOUT in (self.json_file, self.jsonl_file)

    def limits(self, progress: ProgressBar) -> dict[str, Any]:
        """Return the limits of a call that begins now, as `CallKeywords`; the deadline is that of the command."""
        left = None if self.deadline is None else max(0.0, self.deadline - (time.monotonic() - self.began))
        return {"deadline_s": left, "progress": progress}


@click.command()
@options.source_argument()
@click.argument("words", metavar="QUERY...", nargs=-1)
@options.query_options
@options.text_queries_options
@click.option("--track", "first_box", type=box, metavar="L,T,R,B", help="Track the object in this box of frame 1.")
@options.bundle_option
@click.option(
    "--json", "json_file", type=OutputFile(".json", stdout=True),
    help="Write the results of one source, one box per video frame; -: to stdout.",
)  # fmt: skip
@click.option(
    "--jsonl", "jsonl_file", type=OutputFile(".jsonl", stdout=True),
    help="Append a JSON line per source and query; -: to stdout.",
)  # fmt: skip
@click.option(
    "--annotate",
    type=OutputFile(".mp4", ".png", ".jpg"),
    help="Write the video (H.264) or image with the boxes of all queries.",
)
@click.option("--sheet", type=OutputFile(".png"), help="Write a contact sheet of the spans and a timeline.")
@click.option("--exit-code", is_flag=True, help="Exit with code 3 if nothing was found.")
@options.reading_options
@options.index_option
@options.search_options
@click.option(
    "--state", type=OutputFile(), metavar="FILE",
    help="Keep the finished windows of a search here until it is complete; default: beside --json.",
)  # fmt: skip
@options.text_options
@options.backend_options()
@deadline_option
@click.option("--untrained", is_flag=True, help="Run a bundle whose bridging and spatial parts were never trained.")
def infer(
    *, source: str, words: tuple[str, ...], texts: tuple[str, ...], queries_file: Path | None, exit_code: bool,
    **given: Any,
) -> int:  # fmt: skip
    """Find each QUERY in SOURCE: the time span, and a box in every frame of it.

    SOURCE is a video or image: a file, a folder, a pattern such as 'videos/*.mp4', an http or https address of a file,
    a camera such as /dev/video0 or 0, a stream such as rtsp://camera/stream, or - for standard input. With --query or
    --queries, all arguments are sources. The model is loaded once, and a video is processed once for all queries. A
    long one is searched window by window, for all occurrences; after a stop, the same command goes on where it was. Of
    several sources, those that cannot be read are reported, and the exit code is 2. With --track, QUERY is optional.
    """
    from bridge_stg.evaluation.sources.sources import find_sources

    request = Request(
        words=(source, *words) if texts or queries_file else (source,),
        queries=options.all_queries(texts, queries_file) or words,
        reading=options.pop_reading(given),
        backend_options={name: given.pop(name) for name in BACKEND_OPTIONS},
        **given,
    )
    check(request)
    sources = find_sources(request.words, images=request.task == "image")
    check_names(request)
    check_outputs(request, sources)
    with ProgressBar(delay_s=1) as progress, load(request, progress) as grounder:
        found, failed = run(request, sources, grounder, progress)
    if failed:
        LOG.error("%d of %d sources failed.", failed, len(sources))
        return 2
    return 3 if exit_code and not found else 0


def check(request: Request) -> None:
    """Raise BridgeError for queries and options that exclude each other."""
    drawn = request.annotate or request.sheet
    if request.first_box is None and not request.queries:
        raise BridgeError("options.missing", "Missing argument 'QUERY...': what to find, such as \"the red car\".")
    if request.first_box is not None and (request.task != "tube" or len(request.queries) > 1):
        raise BridgeError("options.conflict", "--track takes at most one QUERY and no --task; leave out the others.")
    searched = isinstance(request.window, float) or request.state or request.top
    if searched and (request.first_box is not None or request.task == "image" or request.window == "whole"):
        text = "--window SECONDS, --top and --state search a video"
        raise BridgeError("options.conflict", f"{text}; leave them out with --track, --task image and --window whole.")
    if request.task == "span" and drawn:
        raise BridgeError("options.conflict", "--task span computes no boxes; leave out --annotate and --sheet.")
    for query in request.queries:
        if os.path.splitext(query)[1] and os.path.isfile(query):
            text = f"{query} is a file, not a query; quote a pattern of sources, or pass the queries with --query."
            raise BridgeError("options.conflict", text)


def check_names(request: Request) -> None:
    """Raise BridgeError if two outputs are the same, or lines cannot be appended."""
    if request.jsonl_file and request.jsonl_file != STDOUT:
        from bridge_stg.runtime.live.lines import check_lines

        check_lines(request.jsonl_file)
    if request.json_file == request.jsonl_file == STDOUT:
        raise BridgeError("options.conflict", "--json and --jsonl both write to stdout; leave one out.")
    if request.annotate and request.sheet and request.annotate.resolve() == request.sheet.resolve():
        raise BridgeError("options.conflict", f"{request.sheet} is both --annotate and --sheet; give two names.")


def check_outputs(request: Request, sources: Sequence[Source]) -> None:
    """Raise BridgeError for outputs that do not fit the sources."""
    if is_batch(sources):
        single = {"--json": request.json_file, "--annotate": request.annotate, "--sheet": request.sheet}
        single["--state"] = request.state
        for option, path in single.items():
            if path is not None:
                text = f"{option} is for one source, not for a folder, a pattern or several sources"
                raise BridgeError("options.conflict", f"{text}; use --jsonl, or run infer once per source.")
    if request.state and sources[0].kind != "file":
        text = f"--state needs a file that is still there after a stop, not {sources[0].name}; download it first."
        raise BridgeError("options.conflict", text)
    for output in request.outputs:
        if any(output.exists() and os.path.exists(one.word) and output.samefile(one.word) for one in sources):
            raise BridgeError("output.is_input", f"{output} is the video itself; give another name for the output.")
    if request.annotate and sources[0].kind == "file":
        check_drawing(request, sources[0].word)  # fails now, not after the work


def is_batch(sources: Sequence[Source]) -> bool:
    """Return whether the results are lines: of several sources, or of those that a folder or pattern names."""
    return len(sources) > 1 or sources[0].listed


def check_drawing(request: Request, path: str) -> None:
    """Raise BridgeError if the suffix of `--annotate` does not fit the video or image."""
    from bridge_stg.runtime.video.playback import play
    from bridge_stg.runtime.visualize.annotate import check_suffix

    if request.annotate:
        with play(path, request.stream) as source:
            check_suffix(source, request.annotate)


@contextlib.contextmanager
def load(request: Request, progress: ProgressBar) -> Iterator[Grounder]:
    """Yield the model, loaded while the modules that read videos are imported; write notes about it.

    Raises:
        BundleError: the bundle cannot be loaded, or was never trained.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # idle threads of numpy would busily wait for work
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.host.threads import in_background

    path = request.bundle or demo_bundle(progress=stage_line)
    load_options = {**request.backend_options, **options.pop_head_options(dataclasses.asdict(request))}
    load_options |= {"index": request.index} if request.index else {}
    loading = in_background(lambda: Grounder.load(path, wait=False, **load_options))
    for module in ("av", "PIL.Image", "bridge_stg.runtime.video.file"):  # a missing one is reported when it is used
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    with progress.wait("load_model", loading) as grounder:
        if not grounder.verified:
            LOG.warning(UNVERIFIED)
        heads = grounder.heads
        if not request.untrained and not grounder.spec.is_trained(heads):
            other = "" if grounder.spec.text is None else ", use its text heads (--heads text)"
            advice = f"Train its checkpoint (`train`) and export it again{other}, or pass --untrained to run it anyway."
            raise BundleError("bundle.untrained", f"{untrained_text(path)} {advice}")
        note_untrained(grounder.spec, path, heads=heads)
        note_unknown_words(grounder.spec, request.queries)
        LOG.debug("loaded %s in %.2f s", path, time.monotonic() - request.began)
        yield grounder


def run(request: Request, sources: Sequence[Source], grounder: Grounder, progress: ProgressBar) -> tuple[int, int]:
    """Answer the queries on each source, print and write the results, and return the numbers of found and failed.

    An error of one of several sources is reported, and the others continue; that of a single one is raised.
    """
    from bridge_stg.runtime.chain.results import program_json
    from bridge_stg.runtime.host.limits import Limits

    found = failed = 0
    made_by = {"program": program_json(), "bundle": grounder.bundle}
    with json_lines(request.jsonl_file) as append:
        for source in sources:
            try:
                with source.open(request.reading, Limits(**request.limits(progress))) as path:
                    if source.kind != "file":
                        check_drawing(request, path)
                    # The state of a search belongs to one file, and a temporary copy has another name in the next run.
                    state = request.search_state if source.kind == "file" else None
                    results = ground(request, grounder, path, state=state, progress=progress)
                    write(request, source, path, results, grounder=grounder, progress=progress)
            except (VideoError, QueryError, EngineError) as error:
                if len(sources) == 1:
                    raise
                failed += 1
                progress.close()
                message = error.message if source.name in error.message else f"{source.name}: {error.message}"
                LOG.error("%s", message, extra={"code": error.code})
                for query in request.queries or ("",):
                    problem = {"code": error.code, "message": message}
                    append({"video": source.name, "query": query, "error": problem})
                continue
            found += sum(result.found for result in results)
            for result in results:
                append({"video": source.name, **made_by, **result.to_json()})
            progress.close()
            if not request.to_stdout:
                show(source, results, grounder.target, batch=is_batch(sources))
    if not request.to_stdout:
        for output in request.outputs:
            click.echo(f"wrote {output}")
    return found, failed


def ground(
    request: Request, grounder: Grounder, path: str, *, state: Path | None, progress: ProgressBar
) -> Sequence[Grounding | SearchResult]:
    """Read the video at `path`, and return the result of each query; `state` is the file of a search under way."""
    from bridge_stg.runtime.chain.tasks import TRACKED

    began = time.monotonic()
    tokens = request.max_visual_tokens
    if is_searched(request, grounder, path):
        window_s = None if isinstance(request.window, str) else request.window
        return grounder.search(
            path, request.queries, window_s=window_s, top=request.top, state=state, task=request.task,
            allow_none=request.allow_none, max_visual_tokens=tokens, stream=request.stream, **request.limits(progress),
        )  # fmt: skip
    opening = grounder.open(path, max_visual_tokens=tokens, stream=request.stream, **request.limits(progress))
    with opening as video:
        LOG.debug("read %s in %.2f s", path, time.monotonic() - began)
        limits = request.limits(progress)
        queries = list(request.queries)
        if request.first_box is not None:
            return [video.track(request.first_box, query=queries[0] if queries else TRACKED, **limits)]
        if request.task == "span":
            return [video.span(query, allow_none=request.allow_none, **limits) for query in queries]
        if request.task == "image":
            return [video.locate(query, **limits) for query in queries]
        return video.ground_many(queries, allow_none=request.allow_none, **limits)


def is_searched(request: Request, grounder: Grounder, path: str) -> bool:
    """Return whether the video is searched window by window."""
    if request.first_box is not None or request.task == "image" or request.window == "whole":
        return False
    if request.window != "auto" or request.top or request.state:
        return True
    from bridge_stg.runtime.search.options import is_long

    return os.path.exists(path) and is_long(path, grounder.spec, stream=request.stream)  # `open` says what is wrong


def show(
    source: Source, results: Sequence[Grounding | SearchResult], chosen: ChosenBackend | None, *, batch: bool
) -> None:
    """Print the results of a source: tables and the backend, or one line per query."""
    from bridge_stg.commands.tables import grounding_line, result_table

    if batch:
        for result in results:
            click.echo(grounding_line(source.name, result))
        return
    click.echo("\n\n".join(result_table(result) for result in results))
    if chosen is not None:
        click.echo(f"  backend: {chosen.summary}")


def write(
    request: Request, source: Source, path: str, results: Sequence[Grounding | SearchResult], *, grounder: Grounder,
    progress: ProgressBar,
) -> None:  # fmt: skip
    """Write the files that were requested, each whole or not at all; `path` is the local file of the source."""
    if request.json_file:
        from bridge_stg.runtime.chain.results import origin_json

        origin = origin_json(
            bundle=grounder.bundle, engine=grounder.target, source=source.name, options=request.recorded
        )
        document = {**origin, "results": [result.to_json() for result in results]}
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_text(request.json_file, text)
    if request.annotate or request.sheet:
        from bridge_stg.runtime.chain.results import Grounding
        from bridge_stg.runtime.visualize.annotate import annotate
        from bridge_stg.runtime.visualize.contact_sheet import contact_sheet

        note_missing_letters(request.queries)
        if request.annotate:
            drawn = [one if isinstance(one, Grounding) else one.drawn for one in results]
            annotate(path, drawn, request.annotate, progress=progress)
        if request.sheet:
            best = [one if isinstance(one, Grounding) else one.best for one in results]
            contact_sheet(path, best, request.sheet)


def write_text(path: Path, text: str) -> None:
    """Write a text to stdout, or replace a file; bytes of file names that are not Unicode are escaped as in JSON."""
    if path == STDOUT:
        click.echo(text.encode("utf-8", errors="backslashreplace"), nl=False)
        return
    from bridge_stg.runtime.host.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def json_lines(path: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that appends a value to a file, or to stdout, as one line; without a path, it does nothing."""
    if path is None:
        yield lambda value: None
    elif path == STDOUT:
        yield lambda value: write_text(STDOUT, json.dumps(value, ensure_ascii=False) + "\n")
    else:
        from bridge_stg.runtime.live.lines import appended_lines

        with appended_lines(path) as append:
            yield append


@click.command()
@options.source_argument()
@click.argument("question")
@options.bundle_option
@click.option("--max-tokens", type=COUNT, default=512, show_default=True, help="Maximum tokens of the answer.")
@options.visual_tokens_option
@options.stream_option
@options.index_option
@options.reading_options
@options.backend_options()
@deadline_option
def ask(
    *, source: str, question: str, bundle: Path | None, max_tokens: int, max_visual_tokens: int | None,
    stream: int | None, deadline: float | None, **given: Any,
) -> None:  # fmt: skip
    """Ask a QUESTION about SOURCE (a video or image), and print the answer while the model writes it.

    SOURCE is a file, an address, a camera, a stream, or - for standard input, as for `infer`. The bundle must answer in
    text (docs/text_heads.md). Decoding is greedy.
    """
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.evaluation.sources.sources import find_sources
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.host.limits import Limits

    reading, (video, *others) = options.pop_reading(given), find_sources([source])
    if others or video.listed:
        raise BridgeError("options.conflict", f"{source} is a folder or a pattern; ask about one video.")
    path = bundle or demo_bundle(progress=stage_line)
    began = time.monotonic()
    with Grounder.load(path, **given) as grounder, video.open(reading, Limits(deadline_s=deadline)) as file:
        left = None if deadline is None else max(0.0, deadline - (time.monotonic() - began))
        if not grounder.verified:
            LOG.warning(UNVERIFIED)
        pieces = grounder.ask(
            file, question, max_tokens=max_tokens, max_visual_tokens=max_visual_tokens, stream=stream,
            deadline_s=left,
        )  # fmt: skip
        for piece in pieces:
            click.echo(piece, nl=False)  # which also flushes
    click.echo()
