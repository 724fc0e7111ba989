"""Train a checkpoint on a person's own annotated clips, with the demo's losses; resumable, on CPU or CUDA.

The work lies in `<out>-training/` until the new checkpoint is whole: the state, the log, and the options that it was
begun with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_stg.runtime.errors import BridgeError, CheckpointError
from bridge_stg.training.annotated_clips import check_clips, read_clips
from bridge_stg.training.clip_batches import ClipBatches

if TYPE_CHECKING:
    import torch

    from bridge_stg.model.model import BridgeSTG

NEW_PARTS, PARTS = ("bridging", "spatial"), ("bridging", "spatial", "mergers", "llm", "vision")
WARMUP_STEPS = 200


@dataclass(frozen=True)
class TrainingOptions:
    """How a checkpoint is trained.

    Attributes:
        epochs: how often every clip is seen.
        clips: clips of a step.
        questions: most questions of a clip that are asked in a step.
        fine_frames: frames of a clip at fine size.
        learning_rate: peak, of the bridging and spatial parts.
        backbone_scale: factor on it for the backbone's weights.
        parts: what is trained, of `PARTS`.
        max_visual_tokens: what a video may take of the prompt; None: the model's own bound.
        seed: of the order of the clips, and of the choice of questions and frames.
        bf16: whether products are computed in bfloat16.
    """

    epochs: int = 10
    clips: int = 1
    questions: int = 4
    fine_frames: int = 16
    learning_rate: float = 1e-4
    backbone_scale: float = 0.1
    parts: tuple[str, ...] = PARTS[:-1]
    max_visual_tokens: int | None = None
    seed: int = 0
    bf16: bool = True


def train_clips(
    checkpoint: Path | str,
    annotations: Path | str,
    media: Path | str,
    out: Path | str,
    *,
    options: TrainingOptions | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    resume: bool = True,
    workers: int = 1,
) -> Path:
    """Train a checkpoint on annotated clips and write a new one.

    Args:
        checkpoint: the folder to begin with.
        annotations: JSON lines, see docs/annotations.md.
        media: the folder that its paths start from.
        out: the folder to be made; must not exist.
        options: see `TrainingOptions`.
        device: `cpu`, `cuda`, `cuda:1` …; `auto` takes CUDA where there is any.
        dtype: what the new checkpoint's backbone is stored in; None: as in `checkpoint`.
        resume: go on from the state in `<out>-training/`, if there is one.
        workers: processes that read clips; 0: this one.

    Returns:
        The new checkpoint folder.

    Raises:
        AnnotationError: the annotations cannot be read, or do not fit the media.
        BridgeError: the checkpoint or a video cannot be read, or the loss is no longer finite.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from torch import nn

    from bridge_stg.checkpoint.checkpoint import TOKENIZER, load_checkpoint, open_weights, save_checkpoint
    from bridge_stg.model.config import BridgeSTGConfig
    from bridge_stg.training.clip_task import ClipTask
    from bridge_stg.training.train_loop import run_stage

    checkpoint, out, options = Path(checkpoint), Path(out), options or TrainingOptions()
    if out.exists():
        raise CheckpointError("output.exists", f"{out} is there already; give another --out, or remove it")
    place = chosen_device(device)
    config = BridgeSTGConfig.load(checkpoint)
    clips = read_clips(Path(annotations), Path(media))
    store = open_weights(checkpoint, config)
    model = load_checkpoint(checkpoint, attention="sdpa" if place.type == "cuda" else None).to(place)
    assert model.tokenizer is not None
    check_clips(clips, model.spec)
    folder = out.with_name(out.name + "-training")
    folder.mkdir(parents=True, exist_ok=True)
    documents = {"annotations": Path(annotations), "config": checkpoint / "config.json"}
    same_run(folder / "run.json", run_identity(options, documents, store.files), resume=resume)
    trained = trained_parameters(model, options.parts)
    run_stage(
        "clips",
        nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in trained.items()}),
        parameter_groups(trained, options.backbone_scale),
        ClipTask(model.train(), device=place, train_vision="vision" in options.parts, bf16=options.bf16),
        ClipBatches(
            model.spec, checkpoint / TOKENIZER, clips, seed=options.seed, clips_per_step=options.clips,
            questions=options.questions, fine_frames=options.fine_frames, max_visual_tokens=options.max_visual_tokens,
        ),
        folder=folder,
        total_steps=(steps := -(-options.epochs * len(clips) // options.clips)),
        peak_rate=options.learning_rate,
        warmup=min(WARMUP_STEPS, max(1, steps // 10)),
        resume=resume,
        workers=workers,
    )  # fmt: skip
    save_checkpoint(
        model.eval().to("cpu"), out, checkpoint / TOKENIZER, dtype=dtype or store.dtype, parts_dtype=torch.float32
    )
    return out


def chosen_device(name: str) -> torch.device:
    """Return a device by its name.

    Raises:
        BridgeError: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BridgeError(
            "training.no_device", f"--device {name}: cannot be used here ({reason}); expected auto, cpu or cuda"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise BridgeError("training.no_device", f"--device {name}: expected auto, cpu or cuda")
    return device


def part_of(name: str) -> str:
    """Return the part, of `PARTS`, that a parameter of the model belongs to."""
    if name.startswith("vision_encoder."):
        return "mergers" if "merger" in name else "vision"
    if name.startswith("spatial_decoder."):
        return "spatial"
    return "bridging" if name.startswith("language_model.bridging.") else "llm"


def trained_parameters(model: BridgeSTG, parts: Collection[str]) -> dict[str, Any]:
    """Return the parameters of some parts by name; all others are frozen."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise BridgeError("options.invalid", f"parts: found {unknown or 'none'}; expected some of {', '.join(PARTS)}")
    found = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
        if parameter.requires_grad:
            found[name] = parameter
    return found


def parameter_groups(trained: Mapping[str, Any], backbone_scale: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: the new parts at the full rate, the backbone at a part of it."""
    groups = []
    for scale, new in ((1.0, True), (backbone_scale, False)):
        members = [parameter for name, parameter in trained.items() if (part_of(name) in NEW_PARTS) == new]
        if members:
            groups.append({"params": members, "scale": scale})
    return groups


def run_identity(options: TrainingOptions, documents: Mapping[str, Path], weights: Sequence[Path]) -> dict[str, Any]:
    """Return what must be the same when a run is resumed, as JSON values: options, hashes, sizes of the weights."""
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in documents.items()}
    values = {**asdict(options), **digests, "weights": [[path.name, path.stat().st_size] for path in weights]}
    return dict(json.loads(json.dumps(values)))  # tuples become what is read back


def same_run(path: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Write what a run is begun with, or check it against what it was begun with.

    Raises:
        CheckpointError: the run that is to be resumed was another one.
    """
    if resume and path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if begun.get(name) != value:
                found = f"{begun.get(name)!r}, and is now {value!r}" if name in asdict(TrainingOptions()) else "another"
                raise CheckpointError(
                    "training.other_options",
                    f"{path}: this training was begun with {name} {found}; go on with the same, begin anew with "
                    "--no-resume, or give another --out",
                )
        return
    path.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
