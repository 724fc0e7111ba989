"""The folder `OUT-training` of a training, next to its checkpoint OUT: names of its files, and which run it belongs to.

Needs no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import CheckpointError
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


def training_folder(out: Path) -> Path:
    """Return the folder of the training that writes the checkpoint `out`."""
    return out.with_name(out.name + "-training")


def begin_run(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Create the folder for a run, or check that the run in it is the one to resume.

    Args:
        folder: the folder.
        identity: JSON values that must not change when a run is resumed, written to `RUN`.
        resume: whether to continue the run in the folder; otherwise its states and logs are removed.

    Raises:
        CheckpointError: the run in the folder has another identity, or its file is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN
    identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    if not resume:
        for old in folder.iterdir():
            if old.suffix in (".safetensors", ".jsonl", ".log") or old.name == VALIDATION:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    elif path.is_file():
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
    path.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
