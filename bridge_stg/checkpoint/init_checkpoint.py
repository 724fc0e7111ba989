"""A new checkpoint from a plain vision-language model: its weights as they are, and untrained parts from a seed.

The backbone's files are linked where the disk allows it, or written anew, tensor by tensor, where they must change (an
adapter to merge, another dtype). Knows nothing of training.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bridge_stg.checkpoint.checkpoint import HEAD, TOKENIZER, build_model, check_weights, load_tokenizer, open_weights
from bridge_stg.checkpoint.safetensors_file import write_safetensors
from bridge_stg.checkpoint.weight_store import INDEX, PART_KEYS, PARTS, WEIGHTS, WeightStore, weight_files
from bridge_stg.model.backbones import backbone as adapter_of
from bridge_stg.model.bridging import BridgingQueries
from bridge_stg.model.config import MODEL_TYPE, BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig
from bridge_stg.model.spatial_decoder import SpatialDecoder
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Tokenizer, time_strings, video_segment
from bridge_stg.runtime.errors import BridgeError, CheckpointError

SPARE_BYTES = 64 << 20
"""Left free on the disk."""
Report = Callable[[str], object]


def init_checkpoint(
    backbone: Path | str,
    out: Path | str,
    *,
    seed: int = 0,
    bridging: BridgingConfig | None = None,
    spatial_decoder: SpatialDecoderConfig | None = None,
    dtype: torch.dtype | None = None,
    progress: Report | None = None,
) -> Path:
    """Make a Bridge-STG checkpoint from the folder of a vision-language model.

    Args:
        backbone: a Hugging Face folder: config.json, safetensors, tokenizer.json; a LoRA adapter in it is merged.
        out: the folder to be made; must not exist.
        seed: of the new parts' weights.
        bridging: number of queries and tapped layers; the config's defaults if None.
        spatial_decoder: its sizes; the config's defaults if None.
        dtype: what the backbone is stored in; as it is if None.
        progress: told each stage.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: the folder is not a supported model's, its tokenizer does not fit the prompt, or `out` exists.
    """
    backbone, out, tell = Path(backbone), Path(out), progress or (lambda stage: None)
    if out.exists():
        raise CheckpointError("output.exists", f"{out} is there already; give another --out, or remove it")
    config = new_config(
        backbone, bridging=bridging or BridgingConfig(), spatial_decoder=spatial_decoder or SpatialDecoderConfig()
    )
    check_prompt(load_tokenizer(backbone), config, backbone / TOKENIZER)
    store = open_weights(backbone, config)
    with torch.device("meta"):
        model = build_model(config, where=backbone / "config.json")
    check_weights(model, store, missing_ok=PART_KEYS)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        as_it_is = all(store.raw(key) and dtype in (None, store[key].dtype) for key in store)
        if as_it_is:
            tell("weights: linked or copied")
            link_weights(weight_files(backbone), partial)
        else:
            tell("weights: written anew")
            write_weights(partial / WEIGHTS, store, dtype=dtype, leave_out=(HEAD,) if model.tied else ())
        tell("bridging and spatial parts: new")
        for name, tensors in new_parts(config, seed).items():
            save_file(tensors, partial / name, {"format": "pt"})
            (partial / name).chmod(0o644)  # the package makes files for their owner alone
        config.save(partial)
        shutil.copyfile(backbone / TOKENIZER, partial / TOKENIZER)
        check_weights(model, open_weights(partial, config))
        partial.chmod(0o755)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def new_config(folder: Path, *, bridging: BridgingConfig, spatial_decoder: SpatialDecoderConfig) -> BridgeSTGConfig:
    """Return the config of a checkpoint on a folder's model, with its family's prompt and frames.

    Raises:
        CheckpointError: there is no config.json, or not of a supported model.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "checkpoint.not_found",
            f"{folder}: no such folder; expected the downloaded folder of a vision-language model",
        )
    values = read_json(folder / "config.json")
    if values.get("model_type") == MODEL_TYPE:
        raise CheckpointError(
            "checkpoint.not_a_backbone", f"{folder}: is a Bridge-STG checkpoint already; go on with `train` or `export`"
        )
    family = adapter_of(values)
    mean, std = image_statistics(folder, family.image_mean, family.image_std)
    config = BridgeSTGConfig(
        backbone=values, bridging=bridging, spatial_decoder=spatial_decoder, frames=family.frames(),
        prompt=family.prompt(), image_mean=mean, image_std=std,
    )  # fmt: skip
    return BridgeSTGConfig.from_dict(json.loads(json.dumps(config.to_dict())), str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that a file holds."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "checkpoint.missing_file", f"{path}: no such file; download the model's whole folder"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("checkpoint.bad_config", f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            "checkpoint.bad_config", f"{path}: holds a JSON {type(values).__name__}, expected an object"
        )
    return values


def image_statistics(
    folder: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation of the folder's image processor, or the family's if it has none."""
    path = folder / "preprocessor_config.json"
    values = read_json(path) if path.is_file() else {}
    found = [values.get("image_mean", mean), values.get("image_std", std)]
    for name, numbers in zip(("image_mean", "image_std"), found):
        if not isinstance(numbers, (list, tuple)) or len(numbers) != 3:
            raise CheckpointError("checkpoint.bad_config", f"{path}: {name} is {numbers!r}, expected three numbers")
    return tuple(map(float, found[0])), tuple(map(float, found[1]))


def check_prompt(tokenizer: Tokenizer, config: BridgeSTGConfig, where: Path) -> None:
    """Raise CheckpointError if a tokenizer cannot spell the prompt's markers or tell the times of an answer apart."""
    spec = config.model_spec()
    times = np.arange(2 * spec.frames.max_coarse_groups) / 2
    try:
        segment = video_segment(tokenizer, spec, times, (1, 1))
        AnswerGrammar(tokenizer, spec.prompt, time_strings(times, spec.prompt))
    except BridgeError as error:
        raise CheckpointError(
            "checkpoint.bad_tokenizer", f"{where}: does not fit the prompt of a {spec.vision.family} ({error})"
        ) from error
    if (largest := int(segment.input_ids.max())) >= spec.language.vocab_size:
        raise CheckpointError(
            "checkpoint.bad_tokenizer",
            f"{where}: spells the prompt with id {largest}, but the model has {spec.language.vocab_size:,} ids; "
            "it is another model's tokenizer",
        )


def link_weights(files: list[Path], folder: Path) -> None:
    """Link files, and the index of shards, into a folder of the same file system, or copy them into another."""
    index = files[0].parent / INDEX
    for file in [*files, index] if files[0].name != WEIGHTS else files:
        source = file.resolve()  # downloads are often links into a cache
        try:
            os.link(source, folder / file.name)
        except OSError:
            check_space(folder, source.stat().st_size)
            shutil.copyfile(source, folder / file.name)


def write_weights(path: Path, store: WeightStore, *, dtype: torch.dtype | None, leave_out: tuple[str, ...]) -> None:
    """Write a store's tensors into one file, one at a time, adapters merged.

    Raises:
        CheckpointError: the disk is too small, or a value does not fit the dtype.
    """
    layout = {key: (dtype or tensor.dtype, tensor.shape) for key, tensor in store.items() if key not in leave_out}
    check_space(path.parent, sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values()))

    def cast(key: str) -> torch.Tensor:
        value = store.read(key).to(layout[key][0])
        if not torch.isfinite(value).all():
            raise CheckpointError(
                "checkpoint.not_finite",
                f"{store[key].path}: {key} holds values that {value.dtype} cannot; choose another",
            )
        return value

    write_safetensors(path, layout, cast)


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError if a folder's disk has too little room."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(
            "output.disk_full",
            f"{folder.parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; choose another --out",
        )


def new_parts(config: BridgeSTGConfig, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of the untrained parts in float32, by file and key."""
    spec = config.model_spec()
    count, hidden = spec.language.num_bridging_queries, spec.language.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        queries = BridgingQueries(count, hidden)
        decoder = SpatialDecoder(
            config.spatial_decoder, channels=spec.vision.hidden_size, num_taps=len(spec.language.tapped_layers),
            num_queries=count, hidden_size=hidden,
        )  # fmt: skip
    return {
        PARTS[0]: {f"bridging.queries.{name}": value for name, value in queries.state_dict().items()},
        PARTS[1]: {f"spatial_decoder.{name}": value for name, value in decoder.state_dict().items()},
    }
