"""The commands that serve a bundle: `serve` over HTTP, and `triton`, which writes a model repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, MB, PATH, SECONDS, Count, Number
from bridge_stg.commands.progress import note_untrained
from bridge_stg.runtime.errors import BridgeError


def live_source(value: str) -> tuple[str, str]:
    """Return the name and the source of `name=source`."""
    name, _, source = value.partition("=")
    if not name or not source:
        raise click.BadParameter(f"{value!r}: expected a name and a source, as in gate=rtsp://camera/1.")
    return name, source


@click.command()
@options.bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need an API key.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0: a free one."
)
@click.option("--api-key", help="API key that clients must send; visible in `ps`, so prefer --api-key-env.")
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the API key.")
@click.option("--insecure", is_flag=True, help="Let other machines connect without an API key.")
@click.option(
    "--allow-host", "allow_hosts", multiple=True, metavar="NAME",
    help="Name of this server in the Host header, as a proxy sends it; repeatable.",
)  # fmt: skip
@click.option("--media", type=PATH, help="Folder of videos that clients may request by name.")
@click.option(
    "--sample", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A video that the page offers to try; its query is in the .txt beside it. Default, for the demo: its clip.",
)  # fmt: skip
@click.option(
    "--live", multiple=True, type=live_source, metavar="NAME=SOURCE",
    help="A source that clients may watch, and its name; repeatable.",
)  # fmt: skip
@click.option(
    "--every", "every_s", type=SECONDS, default=1.0, show_default=True, metavar="SECONDS",
    help="Seconds between two live rounds.",
)  # fmt: skip
@click.option(
    "--window", "window_s", type=SECONDS, metavar="SECONDS",
    help="Newest seconds that a live round sees; default: 16, or what the model reads at once.",
)  # fmt: skip
@click.option("--max-upload-mb", type=COUNT, default=256, show_default=True, help="Maximum MB per upload.")
@click.option("--max-storage-mb", type=COUNT, default=4096, show_default=True, help="Maximum MB of all uploads.")
@click.option(
    "--max-duration-s", type=SECONDS, default=14400.0, show_default=True, metavar="SECONDS",
    help="Maximum seconds per video.",
)  # fmt: skip
@click.option("--max-pixels", type=COUNT, default=4096 * 2304, show_default=True, help="Maximum pixels per frame.")
@click.option("--decode-mb", type=COUNT, default=2048, show_default=True, help="Maximum MB of memory to decode a file.")
@click.option("--max-queue", type=COUNT, default=64, show_default=True, help="Maximum number of waiting jobs.")
@click.option(
    "--deadline", "--max-seconds", "max_seconds", type=SECONDS, default=300.0, show_default=True, metavar="SECONDS",
    help="Stop a job after this time, including its time in the queue.",
)  # fmt: skip
@click.option("--max-queries", type=COUNT, default=16, show_default=True, help="Maximum queries per job.")
@click.option(
    "--keep-s", type=SECONDS, default=3600.0, show_default=True, metavar="SECONDS",
    help="Seconds to keep uploads and answers.",
)  # fmt: skip
@click.option("--workers", type=COUNT, default=2, show_default=True, help="Videos processed at a time.")
@click.option("--open-videos", type=COUNT, default=8, show_default=True, help="Videos kept ready for the next query.")
@click.option("--open-mb", type=COUNT, default=1024, show_default=True, help="Maximum MB of open videos.")
@options.index_option
@click.option("--log-requests", is_flag=True, help="Log a line per request: client, route, status, milliseconds.")
@click.option(
    "--drain-s", type=Number(min=0), default=10.0, show_default=True, metavar="SECONDS",
    help="Seconds in which running jobs may finish when the server stops.",
)  # fmt: skip
@options.text_options
@options.backend_options()
@options.kv_option
def serve(
    *, bundle: Path, sample: Path | None, api_key: str | None, api_key_env: str | None,
    live: tuple[tuple[str, str], ...], every_s: float, window_s: float | None, max_upload_mb: int, max_storage_mb: int,
    open_mb: int, decode_mb: int, log_requests: bool, **limits: Any,
) -> None:  # fmt: skip
    """Serve a BUNDLE over HTTP: uploads, jobs, live sources, and a web page.

    Ctrl-C or SIGTERM shuts it down gracefully.
    """
    if len(dict(live)) < len(live):
        raise BridgeError("options.conflict", "--live has two sources of the same name; choose different names.")
    from bridge_stg.demo.bundle import demo_sample
    from bridge_stg.runtime.bundle.bundle import read_manifest
    from bridge_stg.runtime.host.memory import return_freed_memory
    from bridge_stg.server.run import serve as run
    from bridge_stg.server.settings import Settings

    taken = ("threads", "backend", "variant", "kv_budget_bytes", "index", "max_index_bytes")
    load_options = {name: limits.pop(name) for name in taken}
    load_options |= options.pop_head_options(limits)
    settings = Settings(
        api_key=_key(api_key, api_key_env),
        sample=sample or demo_sample(bundle),
        live=dict(live),
        max_upload_bytes=max_upload_mb * MB,
        max_storage_bytes=max_storage_mb * MB,
        open_bytes=open_mb * MB,
        decode_bytes=decode_mb * MB,
        **limits,
    )

    def say(url: str) -> None:
        note_untrained(read_manifest(bundle).spec, bundle, heads=load_options["heads"])
        click.echo(f"Serving {bundle} at {url} (API: {url}docs). Press Ctrl-C to stop.")

    if log_requests:
        _log_requests()
    return_freed_memory()  # a server runs for days, and its memory should not grow
    run(
        bundle,
        settings,
        say=say,
        live={"every_s": every_s, "window_s": window_s},
        **load_options,
    )


def _log_requests() -> None:
    """Write the log of requests to stderr, one line each with its time; with --log-json like all others."""
    import logging

    from bridge_stg.commands.progress import HANDLER

    if HANDLER.as_json:
        logging.getLogger("bridge_stg.server.requests").setLevel(logging.INFO)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("bridge_stg.server.requests")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _key(key: str | None, variable: str | None) -> str | None:
    if variable is None:
        return key
    if key is not None:
        raise BridgeError("options.conflict", "--api-key and --api-key-env are both set; leave one out.")
    if not os.environ.get(variable):
        raise BridgeError("options.invalid", f"--api-key-env {variable}: this environment variable is unset or empty.")
    return os.environ[variable]


@click.command()
@options.bundle_argument
@options.out_option("the model repository")
@click.option("--name", default="bridge_stg", show_default=True, help="Name of the model.")
@options.backend_option
@options.variant_option("the one that fits the server")
@click.option("--media", help="Folder on the server for paths in VIDEO; without it, only VIDEO_BYTES works.")
@click.option("--max-batch", type=COUNT, default=16, show_default=True, help="Maximum queries per batch.")
@click.option(
    "--queue-delay-us", type=Count(min=0), default=5000, show_default=True,
    help="Microseconds to wait for more queries of a batch.",
)  # fmt: skip
@click.option("--instances", type=COUNT, default=1, show_default=True, help="Number of model instances.")
@click.option(
    "--kind",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="Processor of the instances.",
)
@click.option(
    "--open-videos", type=Count(min=0), default=4, show_default=True, help="Videos kept ready between batches."
)
@click.option("--deadline", "deadline_s", type=SECONDS, metavar="SECONDS", help="Stop a query after this time.")
@options.text_options
@options.overwrite_option("model of this name")
def triton(bundle: Path, out: Path, overwrite: bool, **serving: Any) -> None:
    """Write a model repository for Triton Inference Server that serves BUNDLE."""
    from bridge_stg.runtime.bundle.bundle import read_manifest
    from bridge_stg.triton.repository import Serving, write_repository

    chosen = Serving(**options.pop_head_options(serving), **serving)
    made = write_repository(bundle, out, chosen, overwrite=overwrite)
    note_untrained(read_manifest(bundle).spec, bundle, heads=chosen.heads)
    click.echo(f"{made} is complete. Start it with: tritonserver --model-repository={out}")
