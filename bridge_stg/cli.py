"""The command line. Each command is a few lines that call the function that programs call too.

Errors are answered in one place, `run`: a `BridgeError`, a missing package or a file that cannot be opened is one
paragraph on stderr and exit code 2, without a traceback. Heavy imports stay inside the commands.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

import bridge_stg
from bridge_stg.commands import calibrate as cli_calibrate
from bridge_stg.commands.lazy import LazyCommands
from bridge_stg.commands.options import SECONDS, THREADS
from bridge_stg.runtime.errors import BridgeError, BundleError

VARIANTS = ("standard", "primitive")
DTYPES = ("fp32", "fp16", "bf16")
UNVERIFIED = (
    "Note: this bundle is unverified: it was exported with --no-verify, so its graphs were never compared with torch."
)
EXTRAS = {  # the import name of a package and the extra that brings it
    "onnxruntime": "[cpu]", "torch": "[export]", "transformers": "[export]", "onnx": "[export]", "onnx_ir": "[export]",
    "onnxscript": "[export]", "safetensors": "[export]", "skimage": "[train]", "tensorrt": "[tensorrt]",
    "cuda": "[tensorrt]",
    "tensorrt_rtx_bindings": "[rtx]", "ray": "[ray]", "pyarrow": "[ray]",
    "fastapi": "[serve]", "starlette": "[serve]", "pydantic": "[serve]", "anyio": "[serve]", "uvicorn": "[serve]",
    "python_multipart": "[serve]", "prometheus_client": "[serve]",
    "yaml": "[calibrate]", "numpy": "", "av": "", "PIL": "", "tokenizers": "", "tqdm": "",
}  # fmt: skip


class OutputFile(click.ParamType):
    """A file to write: its suffix and folder are checked before any work is done."""

    name = "file"

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.suffix.lower() not in self.suffixes:
            self.fail(f"{value!r} should end in {' or '.join(self.suffixes)}.", param, ctx)
        if path.is_dir():
            self.fail(f"{value!r} is a folder; expected the name of a file.", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{value!r}: the folder {str(path.parent)!r} does not exist. Make it first.", param, ctx)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            self.fail(f"{value!r}: the folder {str(path.parent)!r} is not writable.", param, ctx)
        return path


class Box(click.ParamType):
    """Four numbers: left, top, right, bottom in pixels."""

    name = "box"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            box = tuple(float(side) for side in str(value).split(","))
        except ValueError:
            box = ()
        if len(box) != 4:
            self.fail(
                f"{value!r} is not a box; expected left,top,right,bottom in pixels, as in 10,20,60,80.", param, ctx
            )
        return box


class StageProgress:
    """A progress bar on stderr for each stage that takes over a second; nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()
        self.stage: str | None = None
        self.bar: Any = None

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        if not self.shown:
            return
        if stage != self.stage:
            from tqdm import tqdm

            self.close()
            self.stage = stage
            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if total else "{desc}: {n:.0f} {elapsed}"
            self.bar = tqdm(desc=stage, total=total, delay=1, leave=False, bar_format=form)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def preload_video_packages() -> None:
    """Import what reads videos, in this thread. What is missing is told when a video is opened."""
    for module in ("av", "PIL.Image", "bridge_stg.runtime.video.file"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system, such as a full disk, name this file: writers name its temporary sibling, or none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def stage_line(stage: object, *_: object) -> None:
    """Report a stage of an export: one line each."""
    click.echo(f"  {stage}", err=True)


# In other files: imported when one of them is asked for.
COMMANDS = LazyCommands(
    {
        "build": "bridge_stg.commands.build:build",
        "calibrate": "bridge_stg.commands.calibrate:calibrate",
        "init": "bridge_stg.commands.train:init",
        "train": "bridge_stg.commands.train:train",
        "evaluate": "bridge_stg.commands.evaluate:evaluate",
        "convert-refs": "bridge_stg.commands.evaluate:convert_refs",
        "infer-many": "bridge_stg.commands.infer_many:infer_many",
        "doctor": "bridge_stg.commands.deploy:doctor",
        "triton": "bridge_stg.commands.deploy:triton",
        "serve": "bridge_stg.commands.serve:serve",
        "watch": "bridge_stg.commands.watch:watch",
    }
)


@click.group(commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(bridge_stg.__version__, prog_name="bridge-stg")
def app() -> None:
    """Find when and where a sentence happens in a video, and bring trained checkpoints to the edge."""


@app.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle: a folder to be made.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
@click.option("--variant", "variants", multiple=True, type=click.Choice(VARIANTS), help="Both by default; repeatable.")
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of weights and products.")
@click.option(
    "--verify/--no-verify", default=True, help="Whether to compare the graphs with torch; else they are unverified."
)
@click.option("--int8", is_flag=True, help="Calibrate the bundle too, as `calibrate` does; needs --samples.")
@cli_calibrate.sample_options(required=False)
def export(
    checkpoint: Path,
    out: Path,
    overwrite: bool,
    variants: tuple[str, ...],
    dtype: str,
    verify: bool,
    int8: bool,
    **given: Any,
) -> None:
    """Turn a CHECKPOINT folder into a checked bundle that runs without torch."""
    cli_calibrate.check_int8(int8, dtype, given)
    if out.exists() and not overwrite:
        raise BundleError(f"{out} is there already. Give --overwrite to replace it, or another --out.")
    from bridge_stg.export.export_bundle import export_bundle
    from bridge_stg.export.parity.parity import parity_table

    options: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "verify": verify, "progress": stage_line}
    if int8:
        options["overwrite"] = True  # of what an interrupted call left
        with cli_calibrate.float_bundle(out, given) as path:
            made = export_bundle(checkpoint, path, variants=variants or VARIANTS, **options)
            click.echo(parity_table(made) if verify else UNVERIFIED)
            click.echo(cli_calibrate.calibrate_bundle(made, out, overwrite=overwrite, **given))
        return
    made = export_bundle(checkpoint, out, variants=variants or VARIANTS, **options)
    click.echo(f"{parity_table(made) if verify else UNVERIFIED}\n{made} is complete.")


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def inspect(bundle: Path) -> None:
    """Show what is in a BUNDLE: model, graphs, variants, tensors."""
    from bridge_stg.commands.tables import bundle_table
    from bridge_stg.runtime.bundle.bundle import Bundle

    click.echo(bundle_table(Bundle.load(bundle)))


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="auto", show_default=True, help="The engine that runs the graphs.")
@click.option("--variant", help="Only this variant; by default every one that runs here.")
@click.option("--threads", type=THREADS, help="CPU threads; by default the engine decides.")
@click.option("--bisect", is_flag=True, help="Name the block in which the first drift begins; needs onnx.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="With --bisect: a bundle of the same model that is right; by default another variant of this one.",
)
def verify(
    bundle: Path, backend: str, variant: str | None, threads: int | None, bisect: bool, against: Path | None
) -> None:
    """Hash every file of a BUNDLE and replay its golden cases on this machine.

    With --bisect, a TensorRT backend gets engines of its own for as long as the command runs.
    """
    options: dict[str, Any] = {"backend": backend, "variant": variant, "threads": threads, "report": click.echo}
    if bisect:
        from bridge_stg.export.engines.bisect_engines import engine_maker
        from bridge_stg.export.parity.bisect import verify_and_bisect

        with StageProgress() as progress:
            verify_and_bisect(bundle, against=against, prepare=engine_maker(report=progress, say=stage_line), **options)
        return
    if against is not None:
        raise click.UsageError("--against is the reference of --bisect; give both.")
    from bridge_stg.runtime.parity.verify import verify_bundle

    verify_bundle(bundle, **options)


@app.command()
@click.argument("video")
@click.argument("queries", metavar="QUERY...", nargs=-1)
@click.option(
    "--task",
    type=click.Choice(["tube", "span", "image"]),
    default="tube",
    show_default=True,
    help="When and where; only when; or the one box in an image, where the target is for sure.",
)
@click.option("--track", "first_box", type=Box(), metavar="L,T,R,B", help="Follow what is in this box of frame 1.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Default: the demo bundle, exported if need be.")
@click.option("--json", "json_file", type=OutputFile(".json"), help="Write the results, one box a video frame.")
@click.option(
    "--annotate",
    type=OutputFile(".mp4", ".png", ".jpg"),
    help="Write the video (H.264) or image with box and query drawn.",
)
@click.option("--sheet", type=OutputFile(".png"), help="Write a contact sheet of the span, with a timeline.")
@click.option("--allow-none/--no-allow-none", default=True, help="Whether `not in this video` is a possible answer.")
@click.option("--threads", type=THREADS, help="CPU threads; by default the engine decides.")
@click.option("--backend", default="auto", show_default=True, help="The engine that runs the graphs.")
@click.option("--variant", help="The graphs' dialect; by default the one that fits this machine.")
@click.option(
    "--max-visual-tokens",
    type=click.IntRange(min=1),
    help="What the video may take of the prompt: a long one is read in smaller frames, then at a lower rate.",
)
@click.option("--deadline", type=SECONDS, metavar="SECONDS", help="Give up after that.")
def infer(
    video: str,
    queries: tuple[str, ...],
    task: str,
    first_box: tuple[float, ...] | None,
    bundle: Path | None,
    json_file: Path | None,
    annotate: Path | None,
    sheet: Path | None,
    allow_none: bool,
    threads: int | None,
    backend: str,
    variant: str | None,
    max_visual_tokens: int | None,
    deadline: float | None,
) -> None:
    """Find QUERY in VIDEO (or in an image): the time span, and a box in every frame of it.

    Several queries share the work on the video. With --track, QUERY may be left out.
    """
    if first_box is None and not queries:
        raise click.UsageError("Missing argument 'QUERY...': what to find, such as \"the red car\".")
    if first_box is not None and (task != "tube" or len(queries) > 1):
        raise click.UsageError(
            "--track takes a task of its own and one QUERY at most; leave out --task and the others."
        )
    if task == "span" and (annotate or sheet):
        raise click.UsageError("--task span computes no boxes; leave out --annotate and --sheet.")
    if (annotate or sheet) and len(queries) > 1:
        raise click.UsageError("--annotate and --sheet draw one query; run once a query to draw several.")
    for output in (json_file, annotate, sheet):
        if output is not None and output.exists() and Path(video).exists() and output.samefile(video):
            raise click.UsageError(f"{output} is the video itself; give another name for the output.")
    if annotate is not None and sheet is not None and annotate.resolve() == sheet.resolve():
        raise click.UsageError(f"{sheet} is asked for as --annotate and as --sheet; give each a name of its own.")
    # numpy's own threads have nothing to do here, and would wait for work busily.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.host.threads import Background

    began = time.monotonic()
    if annotate:
        from bridge_stg.runtime.visualize import annotate as draw

        with draw.play(video) as source:  # named wrongly, it would be refused when all is done
            draw.check_suffix(source, annotate)
    path = bundle if bundle is not None else demo_bundle(progress=stage_line)
    loading = Background(lambda: Grounder.load(path, backend=backend, variant=variant, threads=threads, wait=False))
    preload_video_packages()
    from bridge_stg.commands.tables import grounding_table
    from bridge_stg.runtime.chain.tasks import TRACKED

    with StageProgress() as progress, loading.result() as grounder:
        if not grounder.verified:
            click.echo(UNVERIFIED, err=True)
        with grounder.open(
            video, max_visual_tokens=max_visual_tokens, deadline_s=deadline, progress=progress
        ) as opened:
            left = None if deadline is None else max(0.0, deadline - (time.monotonic() - began))
            limits: dict[str, Any] = {"deadline_s": left, "progress": progress}
            if first_box is not None:
                results = [opened.track(first_box, query=queries[0] if queries else TRACKED, **limits)]
            elif task == "span":
                results = [opened.span(query, allow_none=allow_none, **limits) for query in queries]
            elif task == "image":
                results = [opened.locate(query, **limits) for query in queries]
            else:
                results = opened.ground_many(list(queries), allow_none=allow_none, **limits)
        if json_file:
            from bridge_stg.runtime.host.files import replacing

            engine = None if grounder.target is None else grounder.target.to_json()
            document = {"video": video, "engine": engine, "results": [result.to_json() for result in results]}
            text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            with naming(json_file), replacing(json_file) as temporary:
                # Of a name that is no Unicode, the other bytes are escaped as JSON escapes them.
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        if annotate or sheet:
            from bridge_stg.runtime.visualize import annotate as draw

            if annotate:
                with naming(annotate):
                    draw.annotate(video, results[0], annotate, progress=progress)
            if sheet:
                with naming(sheet):
                    draw.contact_sheet(video, results[0], sheet)
    click.echo("\n\n".join(grounding_table(result) for result in results))
    if grounder.target is not None:
        click.echo(f"  engine: {grounder.target.summary}")
    for written in filter(None, (json_file, annotate, sheet)):
        click.echo(f"wrote {written}")


@app.command("train-demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/demo/checkpoint"), show_default=True)
@click.option("--vision-steps", type=click.IntRange(min=1), help="Of the first stage; by default the recipe's.")
@click.option("--grounding-steps", type=click.IntRange(min=1), help="Of the second stage; by default the recipe's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume/--no-resume", default=True, help="Whether to go on from the last state beside --out.")
def train_demo_command(
    out: Path, vision_steps: int | None, grounding_steps: int | None, seed: int, resume: bool
) -> None:
    """Train the demo checkpoint from scratch on synthetic clips."""
    from bridge_stg.demo.train import train_demo

    asked: dict[str, Any] = {"vision_steps": vision_steps, "grounding_steps": grounding_steps}
    steps = {name: count for name, count in asked.items() if count is not None}
    click.echo(f"{train_demo(out, seed=seed, resume=resume, **steps)} holds the checkpoint.")


@app.command("evaluate-demo")
@click.option("--out", type=OutputFile(".json"), default=Path("assets/demo/figures.json"), show_default=True)
@click.option("--clips", type=click.IntRange(min=1), default=200, show_default=True, help="How many held-out clips.")
@click.option("--bundle", type=click.Path(path_type=Path), help="What to measure; by default the demo bundle.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Measure this checkpoint in eager torch instead.")
@click.option("--variant", help="The graphs' dialect; by default the one that fits this machine.")
def evaluate_demo_command(
    out: Path, clips: int, bundle: Path | None, checkpoint: Path | None, variant: str | None
) -> None:
    """Measure the demo model on held-out clips, with controls."""
    from bridge_stg.demo.held_out import evaluate_demo

    click.echo(evaluate_demo(out, clips=clips, bundle=bundle, checkpoint=checkpoint, variant=variant))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for an error that a person can mend, 130 if interrupted."""
    try:
        code = app.main(args=arguments, prog_name="bridge-stg", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return 2
    except BridgeError as error:
        return complain(str(error))
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise  # a fault of ours, not a missing package
        return complain(f'This needs the package {package}. Install it: pip install "bridge-stg{EXTRAS[package]}"')
    except BrokenPipeError:  # the reader of our output went away, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return complain(f"{error.filename or 'A file or standard output'}: {error.strerror or error}")
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; nothing was left half-written.", err=True)
        return 130


def complain(message: str) -> int:
    """Write one paragraph to stderr and return the exit code. It is one line, so that commands in it can be copied."""
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    return 2


def main() -> None:
    """Run the command line and exit."""
    code = run()
    if sys.argv[1:2] == ["infer"] and threading.active_count() == 1:
        # All is written and closed: taking the interpreter apart would only keep the caller waiting.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
