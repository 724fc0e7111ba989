"""Train a checkpoint on a user's annotated clips, resumable, on CPU or CUDA.

State, log and the options of the run are in `<out>-training/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_stg.runtime.errors import BridgeError, CheckpointError
from bridge_stg.runtime.host.files import require_space
from bridge_stg.runtime.host.parse import parse_json_file
from bridge_stg.training.data.clips import ClipBatch, ClipBatches
from bridge_stg.training.data.index import check_clips
from bridge_stg.training.data.mixture import Mixture
from bridge_stg.training.data.sources import read_clips
from bridge_stg.training.recipe import DataRecipe, Source

if TYPE_CHECKING:
    import torch

    from bridge_stg.model.model import BridgeSTG

NEW_PARTS, PARTS = ("bridging", "spatial"), ("bridging", "spatial", "mergers", "llm", "vision")
WARMUP_STEPS = 200


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run."""

    epochs: int = 10
    clips: int = 1  # per step
    questions: int = 4  # largest number of queries per clip and step
    fine_frames: int = 16  # per clip
    learning_rate: float = 1e-4  # peak, of the bridging and spatial parts
    backbone_scale: float = 0.1  # factor on the learning rate of the backbone's weights
    parts: tuple[str, ...] = ("bridging", "spatial", "mergers", "llm")  # trained parts, from `train_clips.PARTS`
    max_visual_tokens: int | None = None  # per video; None: the model's own limit
    seed: int = 0  # of the random order of clips and choice of queries and frames
    bf16: bool = True  # whether matmuls are computed in bfloat16


class StepBatches:
    """Make the clips of a step; picklable for worker processes."""

    def __init__(self, batches: ClipBatches, clips: int) -> None:
        self.batches, self.clips = batches, clips

    def __call__(self, step: int) -> list[ClipBatch] | BridgeError:
        """Return the clips of a step; an error is returned, not raised."""
        found = []
        for place in range(step * self.clips, (step + 1) * self.clips):
            made = self.batches(place)
            if isinstance(made, BridgeError):
                return made
            found.append(made.batch)
        return found


def train_clips(
    checkpoint: Path | str, annotations: Path | str, media: Path | str, out: Path | str, *,
    options: TrainingOptions | None = None, device: str = "auto", dtype: torch.dtype | None = None,
    adapter: Path | str | None = None, resume: bool = True, workers: int = 1,
) -> Path:  # fmt: skip
    """Train a checkpoint on annotated clips, and write a new one to `out`, which must not exist; return `out`.

    Its config says `"trained": true`, and has no section `knows`: the clips may have any words.

    `annotations` are JSON lines (docs/annotations.md) with paths relative to `media`. `device` is `cpu`, `cuda`,
    `cuda:1` …, or `auto`: CUDA if available. `dtype` is that of the new backbone, None as in `checkpoint`. `adapter`,
    a name or path, is a LoRA adapter to merge first; None: the only one in the folder, if any. With `resume`, the
    training continues from the state in `<out>-training/`, if one exists. Clips are read by `workers` processes; with
    0, in this process.

    Raises AnnotationError if the annotations cannot be read or do not fit the media, and BridgeError if the checkpoint
    or a video cannot be read, or the loss is no longer finite.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from torch import nn

    from bridge_stg.checkpoint.checkpoint import load_checkpoint, open_weights, save_checkpoint
    from bridge_stg.checkpoint.weight_store import TOKENIZER
    from bridge_stg.model.config import BridgeSTGConfig
    from bridge_stg.training.clip_task import ClipTask
    from bridge_stg.training.train_loop import run_stage

    checkpoint, out, options = Path(checkpoint), Path(out), options or TrainingOptions()
    if out.exists():
        raise CheckpointError("output.exists", f"{out} already exists; choose another --out, or remove it")
    place = chosen_device(device)
    config = BridgeSTGConfig.load(checkpoint)
    if config.heads != "bridge":
        message = f"{checkpoint}: has {config.heads} heads, and only bridge heads are trained; begin with `init`"
        raise CheckpointError("checkpoint.wrong_model_type", message)
    sources = [Source(annotations=(str(annotations),), media=str(media))]
    clips = read_clips(sources)
    _, store = open_weights(checkpoint, config, adapter=adapter)
    attention = "sdpa" if place.type == "cuda" else None
    model = load_checkpoint(checkpoint, attention=attention, adapter=adapter).to(place)
    assert model.tokenizer is not None
    index = check_clips(clips, sources, model.spec)
    recipe = DataRecipe(
        queries=options.questions, fine_frames=options.fine_frames, max_visual_tokens=options.max_visual_tokens,
        group_by_length=False,
    )  # fmt: skip
    mixture = Mixture(index, recipe, options.seed, 0, options.clips)
    folder = out.with_name(out.name + "-training")
    folder.mkdir(parents=True, exist_ok=True)
    documents = {"annotations": Path(annotations), "config": checkpoint / "config.json"}
    same_run(folder / "run.json", run_identity(options, documents, store.files), resume=resume)
    trained = trained_parameters(model, options.parts)
    dtype, states = dtype or store.dtype, 1 if (folder / "clips.safetensors").exists() else 2
    state_bytes = 12 * sum(parameter.numel() for parameter in trained.values())  # value and two moments in float32
    sizes = (p.numel() * (4 if part_of(name) in NEW_PARTS else dtype.itemsize) for name, p in model.named_parameters())
    require_space(out, states * state_bytes + sum(sizes), purpose="the training")
    run_stage(
        "clips",
        nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in trained.items()}),
        parameter_groups(trained, options.backbone_scale),
        ClipTask(model.train(), device=place, train_vision="vision" in options.parts, bf16=options.bf16),
        StepBatches(ClipBatches(model.spec, checkpoint / TOKENIZER, mixture), options.clips),
        folder=folder,
        total_steps=(steps := -(-options.epochs * len(clips) // options.clips)),
        peak_rate=options.learning_rate,
        warmup=min(WARMUP_STEPS, max(1, steps // 10)),
        resume=resume,
        workers=workers,
    )
    model.config = dataclasses.replace(model.config, trained=True, knows=None)
    save_checkpoint(model.eval().to("cpu"), out, checkpoint / TOKENIZER, dtype=dtype, parts_dtype=torch.float32)
    return out


def chosen_device(name: str) -> torch.device:
    """Return the device of a name; raise BridgeError if it does not exist here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); expected auto, cpu or cuda"
        raise BridgeError("training.no_device", message) from None
    if device.type not in ("cpu", "cuda"):
        raise BridgeError("training.no_device", f"--device {name}: expected auto, cpu or cuda")
    return device


def part_of(name: str) -> str:
    """Return the part, one of `PARTS`, that contains a parameter of the model."""
    if name.startswith("vision_encoder."):
        return "mergers" if "merger" in name else "vision"
    if name.startswith("spatial_decoder."):
        return "spatial"
    return "bridging" if name.startswith("language_model.bridging.") else "llm"


def trained_parameters(model: BridgeSTG, parts: Collection[str]) -> dict[str, Any]:
    """Return the parameters of some parts by name; freeze all others. Raises BridgeError for unknown parts."""
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
    """Return AdamW's parameter groups: the new parts at the full learning rate, the backbone at a scaled one."""
    groups = []
    for scale, new in ((1.0, True), (backbone_scale, False)):
        members = [parameter for name, parameter in trained.items() if (part_of(name) in NEW_PARTS) == new]
        if members:
            groups.append({"params": members, "scale": scale})
    return groups


def run_identity(options: TrainingOptions, documents: Mapping[str, Path], weights: Sequence[Path]) -> dict[str, Any]:
    """Return what must not change when a run is resumed, as JSON values: options, hashes, sizes of the weights."""
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in documents.items()}
    values = {
        **dataclasses.asdict(options),
        **digests,
        "weights": [[path.name, path.stat().st_size] for path in weights],
    }
    return dict(json.loads(json.dumps(values)))  # tuples become lists, as in the file


def same_run(path: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Write the identity of a new run, or raise CheckpointError if a resumed run had another."""
    if resume and path.is_file():
        try:
            begun = dict(parse_json_file(path))
        except (OSError, ValueError, TypeError) as error:
            message = f"{path}: cannot be read ({error}); start again with --no-resume, or choose another --out"
            raise CheckpointError("training.wrong_state", message) from error
        for name, value in identity.items():
            if begun.get(name) != value:
                change = (
                    f" from {begun.get(name)!r} to {value!r}" if name in dataclasses.asdict(TrainingOptions()) else ""
                )
                message = f"{path}: {name} has changed{change} since this training started"
                hint = "use the same, start again with --no-resume, or choose another --out"
                raise CheckpointError("training.other_options", f"{message}; {hint}")
        return
    path.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
