"""The command `serve`: a bundle behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from bridge_stg.commands.options import SECONDS, THREADS

MIB = 2**20
COUNT = click.IntRange(min=1)


class LiveSourceOption(click.ParamType):
    """name=SOURCE."""

    name = "name=source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, _, source = str(value).partition("=")
        if not name or not source:
            self.fail(f"{value!r}: expected a name and a source, as in gate=rtsp://camera/1.", param, ctx)
        return name, source


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; beyond this machine, with a key."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", help="What every call must bring. Others may see it among the processes: see --api-key-env.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the API key.")
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without a key.")
@click.option("--allow-host", "allow_hosts", multiple=True, metavar="NAME", help="Another Host name; for proxies.")
@click.option("--media", type=click.Path(path_type=Path), help="A folder whose videos clients may name.")
@click.option("--live", "live", multiple=True, type=LiveSourceOption(), help="A source that clients may watch.")
@click.option("--every", "every_s", type=SECONDS, default=1.0, show_default=True, help="Seconds between live rounds.")
@click.option("--window", type=COUNT, default=32, show_default=True, help="Coarse frames looked back at live.")
@click.option("--max-upload-mb", type=COUNT, default=256, show_default=True, help="MiB of a file.")
@click.option("--max-storage-mb", type=COUNT, default=4096, show_default=True, help="MiB of all uploads.")
@click.option("--max-duration-s", type=SECONDS, default=600.0, show_default=True, help="Of a video.")
@click.option("--max-pixels", type=COUNT, default=4096 * 2304, show_default=True, help="Of a frame.")
@click.option("--max-queue", type=COUNT, default=64, show_default=True, help="Jobs that may wait.")
@click.option("--max-seconds", type=SECONDS, default=300.0, show_default=True, help="Of a job, waiting included.")
@click.option("--max-queries", type=COUNT, default=16, show_default=True, help="Of a job.")
@click.option("--keep-s", type=SECONDS, default=3600.0, show_default=True, help="How long uploads and answers stay.")
@click.option("--workers", type=COUNT, default=2, show_default=True, help="Videos worked on at a time.")
@click.option("--open-videos", type=COUNT, default=8, show_default=True, help="Videos kept ready for the next query.")
@click.option("--open-mb", type=COUNT, default=1024, show_default=True, help="MiB of memory for them.")
@click.option(
    "--drain-s", type=click.FloatRange(min=0), default=10.0, show_default=True, help="For running jobs at the end."
)
@click.option("--threads", type=THREADS, help="CPU threads; by default the engine decides.")
@click.option("--backend", default="auto", show_default=True, help="The engine that runs the graphs.")
@click.option("--variant", help="The graphs' dialect; by default the one that fits this machine.")
def serve(
    bundle: Path,
    api_key: str | None,
    api_key_env: str | None,
    live: tuple[tuple[str, str], ...],
    every_s: float,
    window: int,
    max_upload_mb: int,
    max_storage_mb: int,
    open_mb: int,
    threads: int | None,
    backend: str,
    variant: str | None,
    **limits: Any,
) -> None:
    """Serve a BUNDLE over HTTP: uploads, jobs, live sources, and a page to look at.

    Ctrl-C or SIGTERM ends it in order.
    """
    if len(dict(live)) < len(live):
        raise click.UsageError("--live names two sources the same; give each a name of its own.")
    from bridge_stg.runtime.host.allocator import return_freed_memory
    from bridge_stg.server.run import serve as run
    from bridge_stg.server.settings import Settings

    settings = Settings(
        api_key=_key(api_key, api_key_env),
        live=dict(live),
        max_upload_bytes=max_upload_mb * MIB,
        max_storage_bytes=max_storage_mb * MIB,
        open_bytes=open_mb * MIB,
        **limits,
    )
    return_freed_memory()  # a server runs for days, and its memory should lie still
    run(
        bundle,
        settings,
        say=lambda url: click.echo(f"Serving {bundle} at {url} (API: {url}docs). Ctrl-C ends it."),
        live={"every_s": every_s, "window": window},
        threads=threads,
        backend=backend,
        variant=variant,
    )


def _key(key: str | None, variable: str | None) -> str | None:
    if variable is None:
        return key
    if key is not None:
        raise click.UsageError("--api-key and --api-key-env are two ways to say one thing; give one.")
    if not os.environ.get(variable):
        raise click.UsageError(
            f"--api-key-env {variable}: there is no such variable in the environment, or it is empty."
        )
    return os.environ[variable]
