"""The values of a backbone's `config.json` that are checked before transformers reads them. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from bridge_stg.runtime.bundle import spec as sizes
from bridge_stg.runtime.bundle.typed_json import Between, from_json
from bridge_stg.runtime.errors import CheckpointError

NUMBERS: dict[str, Any] = {
    "depth": sizes.Count, "num_hidden_layers": sizes.Count, "num_heads": sizes.Count,
    "num_attention_heads": sizes.Count, "num_key_value_heads": sizes.Count | None,
    "head_dim": Annotated[int, Between(8, 2**14, step=8)] | None, "hidden_size": sizes.Width,
    "intermediate_size": Annotated[int, Between(1, 2**22)], "out_hidden_size": sizes.Width,
    "vocab_size": sizes.Vocabulary, "max_position_embeddings": sizes.Tokens, "patch_size": sizes.Count,
    "spatial_merge_size": sizes.Merge, "temporal_patch_size": sizes.Merge,
    "in_channels": Annotated[int, Between(3, 3)], "tokens_per_second": sizes.Rate,
    "num_position_embeddings": sizes.Vocabulary, "window_size": Annotated[int, Between(1, 2**16)],
    "deepstack_visual_indexes": tuple[sizes.Index, ...], "fullatt_block_indexes": tuple[sizes.Index, ...],
    "rms_norm_eps": Annotated[float, Between(0, 1)], "rope_theta": sizes.Base,
    "mrope_section": tuple[sizes.Index, sizes.Index, sizes.Index], "factor": Annotated[float, Between(0.001, 10**6)],
}  # fmt: skip
"""Ranges of a backbone's numbers. onnxruntime's GroupQueryAttention needs a `head_dim` that is a multiple of 8."""


def check_numbers(section: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a number of a section is beyond its range; missing values are left to transformers."""
    for name, value in section.items():
        if name in NUMBERS:
            from_json(NUMBERS[name], value, where + name)
        elif name in {"rope_parameters", "rope_scaling"} and isinstance(value, Mapping):
            check_numbers(value, f"{where}{name}.")


def check_sections(values: Mapping[str, Any], family: str) -> None:
    """Check the sections of a backbone's config and the ranges of their numbers.

    Raises CheckpointError if the weights are quantized, a section is missing, or a number is beyond its range.
    """
    quantization = values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        message = f"the backbone's weights are quantized ({method or 'an unnamed method'}); "
        raise CheckpointError("checkpoint.unsupported_dtype", f"{message}start from the model that they were made from")
    for part, named in (("vision_config", ()), ("text_config", ("num_hidden_layers", "hidden_size"))):
        if not isinstance(values.get(part) or {}, Mapping):
            raise CheckpointError("checkpoint.bad_config", f"{part} is {values[part]!r:.60}, expected an object")
        if not values.get(part) and not (named and all(name in values for name in named)):
            message = f"the backbone's config has no {part}; a {family} model has one"
            raise CheckpointError("checkpoint.bad_config", message)
    for part in ("vision_config", "text_config"):
        try:
            check_numbers(values.get(part) or values, f"{part}." if values.get(part) else "")
        except ValueError as error:
            raise CheckpointError("checkpoint.bad_config", f"the backbone's config is invalid: {error}") from error
