"""The commands `infer` (check the options, run the model, print the results) and `ask` (stream an answer in text)."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, SECONDS, OutputFile
from bridge_stg.commands.progress import (
    LOG,
    ProgressBar,
    note_unknown_words,
    note_untrained,
    stage_line,
    untrained_text,
)
from bridge_stg.commands.results import Outputs, json_lines, output_options
from bridge_stg.runtime.errors import BridgeError, BundleError, EngineError, QueryError, VideoError

if TYPE_CHECKING:
    from bridge_stg.evaluation.sources.reading import Reading
    from bridge_stg.evaluation.sources.sources import Source
    from bridge_stg.runtime import Grounder, SearchResult
    from bridge_stg.runtime.backends.choose import ChosenBackend
    from bridge_stg.runtime.chain.results import Grounding

BACKEND_OPTIONS = ("backend", "variant", "threads", "kv_budget_bytes")
RECORDED = (
    "task", "first_box", "allow_none", "heads", "mode", "grammar", "max_tokens", "max_visual_tokens", "stream",
    "window", "cuts", "top",
)  # fmt: skip
"""Options that may change the answers, and are recorded with them."""
IMPORTED = ("numpy", "onnxruntime", "bridge_stg.runtime.grounder", "av", "PIL.Image", "bridge_stg.runtime.video.file")
"""Modules that are imported while the bundle's files are hashed, in this order: first what sessions on a CPU need."""
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
    outputs: Outputs
    allow_none: bool
    index: Path | None
    max_index_bytes: int | None
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
    cuts: bool
    top: int | None
    state: Path | None
    reading: Reading
    began: float = field(default_factory=time.monotonic)

    @property
    def recorded(self) -> dict[str, Any]:
        """Return the options that may change the answers, by name."""
        values = {name: getattr(self, name) for name in RECORDED} | dict(self.backend_options)
        values["seconds"] = self.reading.seconds  # of a camera or live stream
        del values["kv_budget_bytes"]  # it decides what runs together, not the answers
        return values

    def limits(self, progress: ProgressBar) -> dict[str, Any]:
        """Return the limits of a call that begins now, as `CallKeywords`; the deadline is that of the command."""
        left = None if self.deadline is None else max(0.0, self.deadline - (time.monotonic() - self.began))
        return {"deadline_s": left, "progress": progress}


@click.command()
@options.source_argument()
@click.argument("words", metavar="QUERY...", nargs=-1)
@options.query_options
@options.text_queries_options
@options.bundle_option
@output_options
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
@options.kv_option
@deadline_option
@click.option("--untrained", is_flag=True, help="Run a bundle whose bridging and spatial parts were never trained.")
def infer(
    *, source: str, words: tuple[str, ...], texts: tuple[str, ...], queries_file: Path | None, exit_code: bool,
    task: str | None, first_box: tuple[float, ...] | None, **given: Any,
) -> int:  # fmt: skip
    """Find each QUERY in SOURCE: the time span, and a box in every frame of it.

    SOURCE is a video or image: a file, a folder, a pattern such as 'videos/*.mp4', an http or https address of a file,
    a camera such as /dev/video0 or 0, a stream such as rtsp://camera/stream, or - for standard input. With --query or
    --queries, all arguments are sources. The model is loaded once, and a video is processed once for all queries. A
    long one is searched window by window, for all occurrences; after a stop, the same command goes on where it was. Of
    several sources, those that cannot be read are reported, and the exit code is 2. A track needs no QUERY.
    """
    from bridge_stg.evaluation.sources.sources import find_sources

    request = Request(
        words=(source, *words) if texts or queries_file else (source,),
        queries=options.all_queries(texts, queries_file) or words,
        task=options.chosen_task(task, first_box),
        first_box=first_box,
        outputs=Outputs.pop(given),
        reading=options.pop_reading(given),
        backend_options={name: given.pop(name) for name in BACKEND_OPTIONS},
        **given,
    )
    check(request)
    sources = find_sources(request.words, images=request.task == "image")
    check_sources(request, sources)
    request.outputs.check(sources, stream=request.stream, state=request.state)
    with ProgressBar(delay_s=1) as progress, load(request, progress) as grounder:
        found, failed = run(request, sources, grounder, progress)
    if failed:
        LOG.error("%d of %d sources failed.", failed, len(sources))
        return 2
    return 3 if exit_code and not found else 0


def check(request: Request) -> None:
    """Raise BridgeError for queries and options that exclude each other."""
    if request.task == "track":
        if request.first_box is None:
            text = "--task track needs --first-box L,T,R,B, the box of the target in the first frame, in pixels."
            raise BridgeError("options.missing", text)
        if len(request.queries) > 1:
            raise BridgeError("options.conflict", "--task track takes at most one QUERY; leave out the others.")
    elif not request.queries:
        raise BridgeError("options.missing", "Missing argument 'QUERY...': what to find, such as \"the red car\".")
    options.check_search(request.task, request.window, cuts=request.cuts, top=request.top, state=request.state)
    if request.task == "span" and (request.outputs.annotate or request.outputs.sheet):
        raise BridgeError("options.conflict", "--task span computes no boxes; leave out --annotate and --sheet.")
    for query in request.queries:
        if os.path.splitext(query)[1] and os.path.isfile(query):
            text = f"{query} is a file, not a query; quote a pattern of sources, or pass the queries with --query."
            raise BridgeError("options.conflict", text)


def check_sources(request: Request, sources: Sequence[Source]) -> None:
    """Raise BridgeError for options that do not fit the sources."""
    if is_batch(sources):
        outputs = request.outputs
        single = {"--json": outputs.json_file, "--annotate": outputs.annotate, "--sheet": outputs.sheet}
        single["--state"] = request.state
        for option, path in single.items():
            if path is not None:
                text = f"{option} is for one source, not for a folder, a pattern or several sources"
                raise BridgeError("options.conflict", f"{text}; use --jsonl, or run infer once per source.")
    if request.state and sources[0].kind != "file":
        text = f"--state needs a file that is still there after a stop, not {sources[0].name}; download it first."
        raise BridgeError("options.conflict", text)


def is_batch(sources: Sequence[Source]) -> bool:
    """Return whether the results are lines: of several sources, or of those that a folder or pattern names."""
    return len(sources) > 1 or sources[0].listed


@contextlib.contextmanager
def load(request: Request, progress: ProgressBar) -> Iterator[Grounder]:
    """Yield the model, loaded while the modules that read videos are imported; write notes about it.

    Raises:
        BundleError: the bundle cannot be loaded, or was never trained.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # idle threads of numpy would busily wait for work
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.runtime.host.threads import in_background
    from bridge_stg.runtime.loading import load_grounder

    path = request.bundle or demo_bundle(progress=stage_line)

    load_options = {**request.backend_options, **options.pop_head_options(dataclasses.asdict(request))}
    load_options |= {"index": request.index} if request.index else {}
    load_options |= {"max_index_bytes": request.max_index_bytes} if request.max_index_bytes else {}
    gc.disable()  # modules leave no garbage, and looking for it takes 10 ms
    try:
        loading = in_background(lambda: load_grounder(path, **load_options))
        for module in IMPORTED:  # a missing one is reported when it is used
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    finally:
        gc.enable()
    with progress.wait("load_model", loading) as grounder:
        if not grounder.verified:
            LOG.warning(UNVERIFIED)
        heads = grounder.heads
        if not request.untrained and not grounder.spec.is_trained(heads):
            other = "" if grounder.spec.text is None else ", use its text heads (--heads text)"
            advice = f"Train its checkpoint (`train`) and export it again{other}, or pass --untrained to run it anyway."
            raise BundleError("bundle.untrained", f"{untrained_text(path)} {advice}")
        note_untrained(grounder.spec, path, heads=heads)
        for query in request.queries:
            grounder.check_query(query)  # before a video is read for it
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
    made_by = {"program": program_json(), "bundle": grounder.bundle, "options": request.recorded}
    outputs = request.outputs
    with json_lines(outputs.jsonl_file) as append:
        for source in sources:
            try:
                with source.open(request.reading, Limits(**request.limits(progress))) as path:
                    if source.kind != "file":
                        outputs.check_drawing(path, request.stream)
                    # The state of a search belongs to one file, and a temporary copy has another name in the next run.
                    state = request.state or outputs.search_state if source.kind == "file" else None
                    results = ground(request, grounder, path, state=state, progress=progress)
                    outputs.write(
                        source, path, results, grounder=grounder, recorded=request.recorded, progress=progress
                    )
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
            if not outputs.to_stdout:
                show(source, results, grounder.target, batch=is_batch(sources))
    if not outputs.to_stdout:
        for output in outputs.paths:
            click.echo(f"wrote {output}")
    return found, failed


def ground(
    request: Request, grounder: Grounder, path: str, *, state: Path | None, progress: ProgressBar
) -> Sequence[Grounding | SearchResult]:
    """Read the video at `path`, and return the result of each query; `state` is the file of a search under way."""
    from bridge_stg.runtime.chain.tasks import TRACKED

    began = time.monotonic()
    tokens = request.max_visual_tokens
    if searches(request, grounder, path):
        window_s = None if isinstance(request.window, str) else request.window
        return grounder.search(
            path, request.queries, window_s=window_s, cuts=request.cuts, top=request.top, state=state,
            task=request.task, allow_none=request.allow_none, max_visual_tokens=tokens, stream=request.stream,
            **request.limits(progress),
        )  # fmt: skip
    opening = grounder.open(
        path, max_visual_tokens=tokens, stream=request.stream, image_only=request.task == "image",
        **request.limits(progress),
    )  # fmt: skip
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


def searches(request: Request, grounder: Grounder, path: str) -> bool:
    """Return whether the video is searched window by window."""
    from bridge_stg.runtime.search.options import is_searched

    if request.task in ("image", "track") or not os.path.exists(path):  # `open` says what is wrong
        return False
    return request.state is not None or is_searched(
        path, grounder.spec, window=request.window, top=request.top, stream=request.stream
    )


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
@options.kv_option
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
