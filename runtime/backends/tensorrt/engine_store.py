"""Write engines atomically: an engine's folder is filled under another name and renamed when it is complete."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_stg.runtime.backends.tensorrt.engine_cache import ABOUT, PLAN, EngineEntry, engine_folders
from bridge_stg.runtime.bundle.bundle import Bundle, file_sha256
from bridge_stg.runtime.bundle.manifest import canonical_sha256
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.files import replace_folder, target_of, temporary_sibling


def writable_folder(bundle: Bundle) -> Path:
    """Return the folder of new engines: in the bundle, or in the user's cache if the bundle is read-only.

    Raises:
        EngineError: both are read-only.
    """
    problems = []
    for folder in engine_folders(bundle):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder):
                return folder
        except OSError as error:
            problems.append(f"{folder} ({error.strerror or error})")
    message = f"engines can be written neither to {' nor to '.join(problems)}. Set another cache: XDG_CACHE_HOME=…"
    raise EngineError("output.not_writable", message)


@contextmanager
def new_engine(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder for one engine in `folder`; it is removed after the block unless it was published.

    Temporary folders of killed processes are removed, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(folder / "engine") as partial:
        partial.mkdir()
        yield partial


def publish(partial: Path, entry: EngineEntry) -> EngineEntry:
    """Complete the engine in the folder `partial` and rename it into place. Return it with size, hash and folder.

    It replaces an engine with the same key.
    """
    plan = partial / PLAN
    entry = dataclasses.replace(entry, size=plan.stat().st_size, sha256=file_sha256(plan), folder="")
    values = json.loads(json.dumps(dataclasses.asdict(entry)))
    values["about_sha256"] = canonical_sha256(values, without="")
    (partial / ABOUT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    place = target_of(partial).parent / entry.key.folder(entry.graph, entry.variant)
    place.parent.mkdir(exist_ok=True)
    replace_folder(partial, place)
    return dataclasses.replace(entry, folder=str(place))
