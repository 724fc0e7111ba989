"""Write an engine so that it is never half there: its folder is filled under another name and renamed when complete."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_stg.runtime.backends.tensorrt.engine_cache import ABOUT, PLAN, EngineEntry, engine_folders
from bridge_stg.runtime.bundle.bundle import Bundle, file_sha256
from bridge_stg.runtime.bundle.manifest import canonical_sha256
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.files import replace_folder


def writable_folder(bundle: Bundle) -> Path:
    """Return where new engines go: into the bundle, or into the user's cache if the bundle cannot be written.

    Raises:
        EngineError: neither can be written.
    """
    problems = []
    for folder in engine_folders(bundle):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{uuid.uuid4().hex[:8]}.partial"
            probe.mkdir()
            probe.rmdir()
            return folder
        except OSError as error:
            problems.append(f"{folder} ({error.strerror or error})")
    raise EngineError(
        f"engines can be written neither to {' nor to '.join(problems)}. Make one writable, or name another cache: "
        "XDG_CACHE_HOME=…"
    )


@contextmanager
def new_engine(folder: Path) -> Iterator[Path]:
    """Give a temporary folder for one engine below `folder`; whatever is left of it when the block ends is removed.

    What processes of this machine left that were killed is removed too.
    """
    for left in folder.glob(f".{platform.node()}-*-*.partial"):
        if not _is_running(left):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder / partial_name(pid=os.getpid())
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(*, pid: int) -> str:
    """Return a new name for what a process of this machine is writing."""
    return f".{platform.node()}-{pid}-{uuid.uuid4().hex[:8]}.partial"


def _is_running(partial: Path) -> bool:
    try:
        os.kill(int(partial.name.split("-")[-2]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):  # another user's, or not ours
        return True
    return True


def publish(partial: Path, entry: EngineEntry) -> EngineEntry:
    """Complete the engine whose plan lies in `partial`, and rename it into place. Return it with size, hash and folder.

    An engine of the same key is replaced.
    """
    plan = partial / PLAN
    entry = dataclasses.replace(entry, size=plan.stat().st_size, sha256=file_sha256(plan), folder="")
    values = json.loads(json.dumps(dataclasses.asdict(entry)))
    values["about_sha256"] = canonical_sha256(values, without="")
    (partial / ABOUT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    place = engine_place(partial.parent, entry)
    place.parent.mkdir(exist_ok=True)
    replace_folder(partial, place, aside=partial.with_suffix(".old"))
    return dataclasses.replace(entry, folder=str(place))


def engine_place(folder: Path, entry: EngineEntry) -> Path:
    """Return the folder that an engine of this key has below engines/."""
    return folder / entry.key.folder(entry.graph, entry.variant)
