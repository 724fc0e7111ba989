"""The model's configuration: every number that the paper leaves open is a field here.

Stored as `config.json` in the checkpoint folder. The sections `frames`, `prompt` and `span` are the runtime's own
dataclasses; `model_spec` derives the rest of what the runtime must know.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_stg.model.backbones import backbone
from bridge_stg.runtime.bundle.spec import FramesSpec, ModelSpec, PromptSpec, SpanSpec
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import CheckpointError

MODEL_TYPE = "bridge_stg"


@dataclass(frozen=True)
class BridgingConfig:
    """STSB: learned queries that follow the answer, and the decoder layers that their states are tapped from."""

    num_queries: int = 8
    tapped_layers: tuple[int, ...] = ()
    """Indices of LLM decoder layers; empty: the last layer of each third."""

    def __post_init__(self) -> None:
        _check_count("num_queries", self.num_queries, 2**10)


@dataclass(frozen=True)
class SpatialDecoderConfig:
    """QGSL: by default the sizes of TubeDETR (arXiv 2203.16434) and CG-STVG (arXiv 2401.01578)."""

    width: int = 256
    num_layers: int = 6
    num_heads: int = 8
    ffn_width: int = 2048

    def __post_init__(self) -> None:
        for name, most in {"width": 2**14, "num_layers": 2**8, "num_heads": 2**8, "ffn_width": 2**16}.items():
            _check_count(name, getattr(self, name), most)
        if self.width % self.num_heads:
            raise ValueError(f"spatial_decoder.width {self.width} does not divide by num_heads {self.num_heads}")


def _check_count(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected a whole number from 1 to {most}")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the training losses; l1 and giou as in DETR (arXiv 2005.12872)."""

    language: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    presence: float = 1.0
    heat: float = 1.0
    contrastive: float = 0.1
    contrastive_temperature: float = 0.07
    auxiliary: float = 1.0
    """Scale of the demo's losses on the LLM's hidden states (what is present, enters, leaves, moves)."""


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
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def backbone_config(self) -> Any:
        """Return transformers' config object of the backbone.

        Raises:
            CheckpointError: the architecture is not supported, or its config cannot be used.
        """
        return backbone(self.backbone).config(self.backbone)

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """Indices of the tapped LLM layers, in order."""
        return self._tapped_layers(self.backbone_config())

    def _tapped_layers(self, values: Any) -> tuple[int, ...]:
        depth = values.text_config.num_hidden_layers
        layers = tuple(self.bridging.tapped_layers) or tuple(depth * (i + 1) // 3 - 1 for i in range(3))
        if any(not 0 <= layer < depth for layer in layers):
            raise CheckpointError(
                "checkpoint.bad_config",
                f"bridging.tapped_layers is {list(layers)}, but the LLM has layers 0 to {depth - 1}",
            )
        return layers

    def model_spec(self) -> ModelSpec:
        """Derive what the runtime must know: geometry of the graphs and the rules around them.

        Raises:
            CheckpointError: see `backbone_config`; or a tapped layer is not there.
        """
        family, values = backbone(self.backbone), self.backbone_config()
        return ModelSpec(
            vision=family.vision_spec(values, mean=self.image_mean, std=self.image_std),
            language=family.language_spec(
                values,
                num_bridging_queries=self.bridging.num_queries,
                tapped_layers=self._tapped_layers(values),
            ),
            frames=self.frames,
            prompt=self.prompt,
            span=self.span,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self), "backbone": dict(self.backbone)}

    def save(self, folder: Path) -> None:
        """Write `config.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> BridgeSTGConfig:
        """Read JSON values.

        Raises:
            CheckpointError: not a Bridge-STG config, or a field is unknown, missing or of a wrong kind.
        """
        values = dict(values)
        model_type = values.pop("model_type", None)
        if model_type != MODEL_TYPE:
            raise CheckpointError(
                "checkpoint.wrong_model_type", f"{where}: model_type is {model_type!r}, expected {MODEL_TYPE!r}"
            )
        try:
            config = from_json(cls, values)
            config.model_spec()
        except (CheckpointError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                "checkpoint.bad_config", f"{detail if where in detail else f'{where}: {detail}'}"
            ) from error
        return config

    @classmethod
    def load(cls, folder: Path) -> BridgeSTGConfig:
        """Read `config.json` of a checkpoint folder.

        Raises:
            CheckpointError: the file is missing, not JSON, or does not describe a Bridge-STG model.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                "checkpoint.missing_file", f"{path}: no such file; a checkpoint is a folder with a config.json"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError("checkpoint.bad_config", f"{path}: cannot be read as JSON ({error})") from error
        if not isinstance(values, dict):
            raise CheckpointError(
                "checkpoint.bad_config", f"{path}: holds a JSON {type(values).__name__}, expected an object"
            )
        return cls.from_dict(values, str(path))
