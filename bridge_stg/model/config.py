"""The model's configuration, stored as `config.json` in the checkpoint folder.

Every number that the paper leaves open is a field here. The sections `frames`, `prompt` and `span` are the runtime's
own dataclasses; `model_spec` derives the rest of what the runtime needs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from bridge_stg.model.backbones import FAMILIES, backbone
from bridge_stg.model.backbones.sections import check_sections
from bridge_stg.runtime.bundle.spec import (
    Count,
    Deviations,
    FramesSpec,
    Index,
    KnowsSpec,
    Means,
    ModelSpec,
    PromptSpec,
    SpanSpec,
    TextSpec,
)
from bridge_stg.runtime.bundle.typed_json import Between, from_json
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.host import parse

MODEL_TYPE = "bridge_stg"
LossWeight: TypeAlias = Annotated[float, Between(0, 10**6)]


@dataclass(frozen=True)
class BridgingConfig:
    """STSB: the learned queries that follow the answer, and the LLM layers whose hidden states are tapped."""

    num_queries: Count = 8
    tapped_layers: tuple[Index, ...] = ()
    """Indices of LLM decoder layers; if empty, the last layer of each third, or every layer of an LLM of one or two."""

    def layers(self, depth: int) -> tuple[int, ...]:
        """Return the tapped layers of an LLM with `depth` layers."""
        count = min(3, depth)
        return tuple(self.tapped_layers) or tuple(depth * (i + 1) // count - 1 for i in range(count))


@dataclass(frozen=True)
class SpatialDecoderConfig:
    """QGSL; the defaults are the sizes of TubeDETR (arXiv 2203.16434) and CG-STVG (arXiv 2401.01578)."""

    width: Annotated[int, Between(1, 2**14)] = 256
    num_layers: Annotated[int, Between(1, 2**8)] = 6
    num_heads: Annotated[int, Between(1, 2**8)] = 8
    ffn_width: Annotated[int, Between(1, 2**16)] = 2048

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width is {self.width}, expected a multiple of num_heads {self.num_heads}")

    @classmethod
    def of_width(cls, width: int) -> SpatialDecoderConfig:
        """Return the defaults at another width: at most 8 heads, of at least 32 channels unless there is only one."""
        heads = next(count for count in (8, 4, 2, 1) if count == 1 or (width >= 32 * count and width % count == 0))
        return cls(width=width, num_heads=heads, ffn_width=8 * width)

    @classmethod
    def fitting(cls, hidden_size: int) -> SpatialDecoderConfig:
        """Return the defaults for an LLM of a width; the decoder is narrower if the LLM is narrower than 256."""
        return cls.of_width(min(256, max(8, hidden_size // 8 * 8)))


@dataclass(frozen=True)
class LossConfig:
    """Weights of the training losses; l1 and giou as in DETR (arXiv 2005.12872)."""

    language: LossWeight = 1.0
    l1: LossWeight = 5.0
    giou: LossWeight = 2.0
    presence: LossWeight = 1.0
    heat: LossWeight = 1.0
    contrastive: LossWeight = 0.1
    contrastive_temperature: Annotated[float, Between(0.001, 1000)] = 0.07
    auxiliary: LossWeight = 1.0  # weight of the demo's auxiliary losses on the LLM's hidden states


@dataclass(frozen=True)
class BridgeSTGConfig:
    """Configuration of a Bridge-STG checkpoint."""

    backbone: Mapping[str, Any]
    """The backbone's own Hugging Face config, as a dict; its `model_type` names the family."""
    bridging: BridgingConfig = field(default_factory=BridgingConfig)
    spatial_decoder: SpatialDecoderConfig = field(default_factory=SpatialDecoderConfig)
    frames: FramesSpec = field(default_factory=FramesSpec)
    prompt: PromptSpec = field(default_factory=PromptSpec)
    span: SpanSpec = field(default_factory=SpanSpec)
    losses: LossConfig = field(default_factory=LossConfig)
    image_mean: Means = (0.5, 0.5, 0.5)
    image_std: Deviations = (0.5, 0.5, 0.5)
    trained: bool = True
    """False until `train` has trained the bridging and spatial parts that `init` made."""
    knows: KnowsSpec | None = None
    """What the model was trained to find; None: not stated."""
    heads: str = "bridge"
    """Default of `runtime.bundle.spec.HEADS`; a `text` model has neither bridging queries nor a spatial decoder."""
    text: TextSpec | None = None

    def backbone_config(self) -> Any:
        """Return transformers' config object of the backbone; see `Backbone.config` for its errors."""
        return backbone(self.backbone).config(self.backbone)

    def model_spec(self) -> ModelSpec:
        """Derive what the runtime needs: the geometry of the graphs and the rules around them.

        Raises CheckpointError if the backbone's config cannot be used, or a tapped layer does not exist.
        """
        family, values = backbone(self.backbone), self.backbone_config()
        layers = self.bridging.layers(values.text_config.num_hidden_layers)
        queries = self.bridging.num_queries
        if self.heads == "text":
            layers, queries = (), 0
        try:
            spec = ModelSpec(
                vision=family.vision_spec(values, mean=self.image_mean, std=self.image_std),
                language=family.language_spec(values, num_bridging_queries=queries, tapped_layers=layers),
                frames=self.frames,
                prompt=self.prompt,
                span=self.span,
                trained=self.trained,
                knows=self.knows,
                heads=self.heads,
                text=self.text,
            )
            return from_json(ModelSpec, dataclasses.asdict(spec))  # checks what follows from the backbone's config
        except ValueError as error:
            raise CheckpointError("checkpoint.bad_config", str(error)) from error

    def untied(self) -> BridgeSTGConfig:
        """Return the config of the same model with a head of its own."""
        untied: dict[str, Any] = {"tie_word_embeddings": False}
        if self.backbone.get("text_config"):
            untied["text_config"] = self.backbone["text_config"] | untied
        return dataclasses.replace(self, backbone={**self.backbone, **untied})

    def to_dict(self) -> dict[str, Any]:
        """Return the values of `config.json`."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self), "backbone": dict(self.backbone)}

    def save(self, folder: Path) -> None:
        """Write `config.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def checked(self, where: Path) -> BridgeSTGConfig:
        """Return the config as it would be read from the file `where`. Raises CheckpointError as `from_dict` does."""
        return self.from_dict(json.loads(json.dumps(self.to_dict())), str(where))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> BridgeSTGConfig:
        """Check and convert the values of a `config.json`; `where` is the file's name in error messages.

        Raises CheckpointError if it is not a Bridge-STG config, or a field is unknown, missing or of a wrong type.
        """
        values = dict(values)
        model_type = values.pop("model_type", None)
        if model_type != MODEL_TYPE:
            message = f"{where}: model_type is {model_type!r}, expected {MODEL_TYPE!r}, which `init` makes"
            raise CheckpointError("checkpoint.wrong_model_type", message)
        try:
            config = from_json(cls, values)
            if (family := config.backbone.get("model_type")) in FAMILIES:
                check_sections(config.backbone, family)  # before torch is imported
            config.model_spec()
        except (CheckpointError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            code = error.code if isinstance(error, CheckpointError) else "checkpoint.bad_config"
            raise CheckpointError(code, detail if where in detail else f"{where}: {detail}") from error
        return config

    @classmethod
    def load(cls, folder: Path) -> BridgeSTGConfig:
        """Read `config.json` of a checkpoint folder. Raises CheckpointError as `read_json` and `from_dict` do."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path, hint="a checkpoint is a folder with a config.json"), str(path))


def check_model_type(values: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if the config in a file is neither of a checkpoint nor of a plain model."""
    if (found := values.get("model_type")) not in (MODEL_TYPE, *FAMILIES):
        expected = f"{MODEL_TYPE!r}, or a plain model of {' or '.join(FAMILIES)}"
        raise CheckpointError("checkpoint.wrong_model_type", f"{path}: model_type is {found!r}, expected {expected}")


def read_json(path: Path, *, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file; `hint` is the advice if the file does not exist."""
    try:
        values = parse.parse_json_file(path)
    except FileNotFoundError:
        raise CheckpointError("checkpoint.missing_file", f"{path}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError("checkpoint.bad_config", f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        message = f"{path}: contains a JSON {type(values).__name__}, expected an object"
        raise CheckpointError("checkpoint.bad_config", message)
    return values
