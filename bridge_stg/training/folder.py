"""The folder `OUT-training` of a training, next to its checkpoint OUT: names of its files, and which run it belongs to.

Needs no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.host.files import lock_file, replacing
from bridge_stg.runtime.host.parse import parse_json_file

LOG = "log.jsonl"
"""Figures, validations and events of all stages, one per line."""
TEXT_LOG = "train.log"
"""The lines that a training prints."""
SKIPPED = "skipped.jsonl"
"""Media that could not be read, with the reason."""
RUN = "run.json"
"""The recipe, and hashes of the data and weights."""
VALIDATION = "validation"
"""Folder of the rows of all validations."""
REPORT = "train_report.html"
LOCK = "lock"
"""Locked while a command trains in the folder."""


def training_folder(out: Path) -> Path:
    """Return the folder of the training that writes the checkpoint `out`."""
    return out.with_name(out.name + "-training")


def require_apart(out: Path, checkpoint: Path) -> None:
    """Raise CheckpointError `output.is_input` if `out` is in the folder of the checkpoint a training starts from.

    The same for a checkpoint in the folder of the training.
    """
    for inner, outer in ((out, checkpoint), (checkpoint, training_folder(out))):
        if inner.resolve().is_relative_to(outer.resolve()):
            message = f"{inner} is inside of {outer}; choose another --out than {out}"
            raise CheckpointError("output.is_input", message)


@contextmanager
def locked_run(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """Lock the folder until the end of the block, and do what `begin_run` does.

    Raises as `begin_run`, and BridgeError `output.in_use` if another training uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    require_own(folder)
    with open(folder / LOCK, "ab") as file:
        lock_file(file.fileno(), message=f"{folder}: another training runs there; wait, or choose another --out")
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=file.close)  # workers may outlive a killed training by seconds
        begin_run(folder, identity, resume=resume)
        yield


def require_own(folder: Path) -> None:
    """Raise CheckpointError `output.exists` if a folder has files, but is not that of a training."""
    others = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if others and RUN not in others:
        message = f"{folder} has files, such as {others[0]}, but no {RUN} of a training"
        raise CheckpointError("output.exists", f"{message}; move it away, or choose another --out")


def begin_run(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Create the folder for a run, or check that the run in it is the one to resume.

    Args:
        folder: the folder.
        identity: JSON values that must not change when a run is resumed, written to `RUN`.
        resume: whether to continue the run in the folder; otherwise its states, logs and checkpoints are removed.

    Raises:
        CheckpointError: the run in the folder has another identity, or its file is damaged; the folder is not that of a
            training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    require_own(folder)
    path = folder / RUN
    identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    if resume and path.is_file():
        try:
            begun = dict(parse_json_file(path))
        except (OSError, ValueError, TypeError) as error:
            message = f"{path}: cannot be read ({error}); start again with --no-resume, or choose another --out"
            raise CheckpointError("training.wrong_state", message) from error
        changed = [name for name, value in identity.items() if begun.get(name) != value]
        if changed:
            message = f"{path}: {', '.join(changed)} changed since this training started"
            hint = "use the same, start again with --no-resume, or choose another --out"
            raise CheckpointError("training.other_options", f"{message}; {hint}")
        return
    if path.is_file():
        _write(path, {})  # so that nothing is resumed if the removal is interrupted
        for old in folder.iterdir():
            if old.is_dir() and (old.name == VALIDATION or (old / "config.json").is_file()):
                shutil.rmtree(old)
            elif old.is_file() and old.suffix in (".safetensors", ".jsonl", ".log", ".html"):
                old.unlink()
    _write(path, identity)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
