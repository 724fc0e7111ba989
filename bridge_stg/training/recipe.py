"""The training recipe: data, validation and stages, read from YAML. No torch modules.

docs/training.md explains every field.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from bridge_stg.runtime.bundle.typed_json import Between, from_json
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.parse import parse_yaml_file

NEW_PARTS = ("bridging", "spatial")
"""Parts that `init` adds to a backbone."""
PARTS = (*NEW_PARTS, "mergers", "llm", "vision")
"""Parts of the model: `mergers` and `vision` are those of the vision encoder, `vision` its blocks."""
LORA, AUXILIARY = "lora", "auxiliary"
"""Names in `Stage.rates` for LoRA adapters, and for modules that are discarded after training."""
SHIPPED = Path(__file__).parent / "recipes"
STAGE_NAME, TAKEN_NAMES = re.compile(r"[\w-]{1,50}"), ("validation",)
"""Form of the name of a stage, which files and a folder get, and the names of other folders beside them."""
Share: TypeAlias = Annotated[float, Between(0, 1)]
Steps: TypeAlias = Annotated[int, Between(1, 10**8)]
Decay: TypeAlias = Annotated[float, Between(0, 0.999999)]
Number: TypeAlias = Annotated[float, Between(0, 10**6)]


@dataclass(frozen=True)
class Source:
    """Annotations of a dataset: `dataset` is one of `evaluation.datasets.registry.DATASETS`."""

    annotations: tuple[str, ...]
    dataset: str = "jsonl"
    media: str | None = None  # folder of the media; None: that of the first annotation file
    split: str | None = None
    weight: Annotated[float, Between(0.000001, 10**6)] = 1.0  # of the source among all
    limit: Steps | None = None  # use only the first samples


@dataclass(frozen=True)
class Augmentation:
    """Probability of each change of a clip."""

    crop: Share = 0.0  # to at least half of each side, with all boxes inside
    flip: Share = 0.0  # left to right, with "left" and "right" swapped in queries
    colour: Share = 0.0  # brightness, contrast and saturation
    scale: Share = 0.0  # fewer pixels per frame, at least half of each side
    time: Share = 0.0  # starts up to one group of frames later


@dataclass(frozen=True)
class DataRecipe:
    """What the clips of a training are made of."""

    sources: tuple[Source, ...] = ()
    queries: Steps = 4  # largest number of queries per clip and step
    fine_frames: Steps = 16  # per clip
    max_visual_tokens: Steps | None = None  # per video; None: the model's own limit
    absent: Share = 0.0  # share of queries that are replaced by those of other media, with the answer "none"
    tracked: Share = 0.125  # share of queries for targets present from the start that are given by the first box
    near_span: Share = 0.5  # share of queries that attend only to fine frames near the span, as in inference
    augment: Augmentation = field(default_factory=Augmentation)
    frame_cache: str | None = None  # folder for decoded frames
    group_by_length: bool = True  # whether the clips of a step have similar lengths
    max_broken: Share = 0.05  # share of clips that may be unreadable before the training stops


@dataclass(frozen=True)
class Validation:
    """How the model is measured during the training."""

    sources: tuple[Source, ...] = ()
    samples: Steps = 64  # of all sources together
    every: Steps = 500  # steps
    metric: str = "m_vIoU"  # decides which checkpoint is the best
    patience: Steps | None = None  # validations without a better metric before a stage ends early; None: never


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on linear layers of some parts, whose own weights stay frozen."""

    rank: Annotated[int, Between(1, 4096)] = 32
    alpha: Number = 32.0
    rslora: bool = False  # scale by alpha / √rank (arXiv 2312.03732)
    dropout: Annotated[float, Between(0, 0.99)] = 0.0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    parts: tuple[str, ...] = ("llm",)

    def __post_init__(self) -> None:
        check_parts("parts", self.parts, ("llm", "vision"))
        if not self.parts:
            raise ValueError("parts is empty; expected llm, vision or both")


@dataclass(frozen=True)
class Stage:
    """A run of steps with its own trained parts, learning rates and optimizer state."""

    name: str
    steps: Steps
    train: tuple[str, ...] = NEW_PARTS  # parts of the model whose weights are all trained
    lora: Lora | None = None
    clips: Steps = 8  # per step, over all processes
    learning_rate: Annotated[float, Between(0, 1)] = 1e-4  # peak
    rates: Mapping[str, Number] = field(default_factory=dict)  # factor on the learning rate of a part, or of `lora`
    schedule: str = "cosine"  # or `constant`
    warmup: Annotated[int, Between(0, 10**8)] = 100  # steps
    final_rate: Share = 0.03  # share of the peak at the end of a cosine
    optimizer: str = "adamw"  # or `adamw8bit`, which needs bitsandbytes
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    weight_decay: Number = 0.02  # of matrices
    max_gradient_norm: Annotated[float, Between(0.000001, 10**9)] = 1.0
    ema: Decay = 0.0  # decay of the moving average of the new parts; 0: none
    checkpoint_activations: bool = False  # recompute activations in the backward pass instead of keeping them
    spike: Annotated[float, Between(1, 10**6)] = 10.0  # a loss this many times the recent median is skipped

    def __post_init__(self) -> None:
        if not STAGE_NAME.fullmatch(self.name) or self.name in TAKEN_NAMES:
            form = "1 to 50 letters, digits, _ or -"
            raise ValueError(f"name is {self.name!r:.60}; expected {form}, and not {' or '.join(TAKEN_NAMES)}")
        check_parts("train", self.train, PARTS)
        check_parts("rates", tuple(map(str, self.rates)), (*PARTS, LORA, AUXILIARY))
        if not self.train and self.lora is None:
            raise ValueError("trains nothing: give parts in 'train', or 'lora'")
        for name, value, known in (
            ("schedule", self.schedule, ("cosine", "constant")), ("optimizer", self.optimizer, ("adamw", "adamw8bit")),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of: {', '.join(known)}")
        if self.lora is not None and (both := sorted(set(self.lora.parts) & set(self.train))):
            raise ValueError(f"{both[0]} is in 'train' and in 'lora.parts'; choose one")


@dataclass(frozen=True)
class TrainingRecipe:
    """A training: its stages, one after the other, on the same data."""

    stages: tuple[Stage, ...]
    data: DataRecipe = field(default_factory=DataRecipe)
    validation: Validation | None = None
    seed: Annotated[int, Between(0, 2**32 - 1)] = 0
    precision: str = "bf16"  # of matmuls: `bf16` or `fp32`
    save_every_s: Number = 300.0  # seconds between saved states
    log_every: Steps = 50  # steps between lines of the log

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("has no stages")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("two stages have the same name")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision is {self.precision!r}; expected bf16 or fp32")

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the YAML file."""
        return dataclasses.asdict(self)


def check_parts(name: str, parts: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raise ValueError if some `parts` are not `known`."""
    unknown = sorted(set(parts) - set(known))
    if unknown:
        raise ValueError(f"{name} has {unknown[0]!r}; expected some of: {', '.join(known)}")


def read_recipe(name: Path | str) -> TrainingRecipe:
    """Read a YAML file, or a recipe of this package by its name. Paths in it are relative to the file's folder.

    A file with the field `base`, another file or a name, only gives what differs: mappings are merged, and all other
    values, lists too, are replaced. Raises BridgeError `training.bad_recipe`, which names the field.
    """
    path, values = _recipe_values(name, Path(), ())
    try:
        return from_json(TrainingRecipe, values)
    except ValueError as error:
        raise _bad_recipe(path, error) from error


def _recipe_values(name: Path | str, folder: Path, above: tuple[Path, ...]) -> tuple[Path, Any]:
    """Return the path and merged values of a recipe that a file in `folder` names; `above` are the recipes based on it.

    Paths of annotations, media and caches in the values are relative to the working folder.
    """
    path, shipped = folder / name, SHIPPED / f"{name}.yaml"
    if not path.is_file():
        if not shipped.is_file():
            known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
            where = f"{above[-1]}: base is {name}: " if above else f"{name}: "
            found = "not a file" if path.is_dir() else "no such file"
            message = f"{where}{found}, and no recipe of this package, which are: {known}"
            raise BridgeError("training.bad_recipe", message)
        path = shipped
    if path.resolve() in (other.resolve() for other in above):
        chain = " → ".join(map(str, (*above, path)))
        raise BridgeError("training.bad_recipe", f"{chain}: a recipe is its own base; remove one field 'base'")
    try:
        values = parse_yaml_file(path)
    except (OSError, ValueError) as error:
        raise _bad_recipe(path, error) from error
    if not isinstance(values, dict):
        return path, values
    if path != shipped:
        _prepend_folder(values, path.parent)
    if "base" not in values:
        return path, values
    base = values.pop("base")
    if not isinstance(base, str):
        raise _bad_recipe(path, ValueError(f"base is {base!r:.60}, expected the name of a recipe or of a file"))
    return path, _merged(_recipe_values(base, path.parent, (*above, path))[1], values)


def _prepend_folder(values: dict[str, Any], folder: Path) -> None:
    """Put `folder` before the paths of a recipe's values, in place; values of wrong types are left to `from_json`."""

    def prepended(value: Any) -> Any:
        if isinstance(value, list):
            return [prepended(one) for one in value]
        return str(folder / value) if isinstance(value, str) else value

    for section in (values.get("data"), values.get("validation")):
        if not isinstance(section, dict):
            continue
        sources = section.get("sources")
        for fields in (section, *(sources if isinstance(sources, list) else ())):
            if isinstance(fields, dict):
                names = [name for name in ("annotations", "media", "frame_cache") if name in fields]
                fields.update({name: prepended(fields[name]) for name in names})


def _merged(base: Any, values: Any) -> Any:
    """Return the values over those of a base: mappings are merged, all else is replaced."""
    if not (isinstance(base, dict) and isinstance(values, dict)):
        return values
    return base | {key: _merged(base.get(key), value) for key, value in values.items()}


def _bad_recipe(path: Path, error: Exception) -> BridgeError:
    return BridgeError("training.bad_recipe", f"{path}: {error}; docs/training.md lists the fields")
