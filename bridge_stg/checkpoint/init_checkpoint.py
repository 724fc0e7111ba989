"""Create a checkpoint from a vision-language model: the backbone's weights unchanged, the new parts from a seed.

The backbone's files are linked if the file system allows it, else copied; they are rewritten tensor by tensor to merge
an adapter or change the dtype. Must not know training.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from bridge_stg.checkpoint.checkpoint import (
    build_model,
    cast_weight,
    check_weights,
    load_tokenizer,
    open_weights,
    save_files,
)
from bridge_stg.checkpoint.plain_folder import DOWNLOAD, image_statistics, text_section
from bridge_stg.checkpoint.safetensors_file import write_safetensors
from bridge_stg.checkpoint.weight_store import (
    INDEX,
    PART_FILES,
    PART_KEYS,
    TOKENIZER,
    WEIGHTS,
    WeightStore,
    check_folder,
    require_new,
    weight_files,
)
from bridge_stg.model.backbones import backbone as adapter_of
from bridge_stg.model.bridging import BridgingQueries
from bridge_stg.model.config import MODEL_TYPE, BridgeSTGConfig, BridgingConfig, SpatialDecoderConfig, read_json
from bridge_stg.model.spatial_decoder import SpatialDecoder
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.host.files import replace_folder, require_space, target_of, temporary_sibling

SPARE_BYTES = 64 << 20
"""Disk space that must stay free."""
Report = Callable[[str], object]
DecoderOfWidth = Callable[[int], SpatialDecoderConfig]


def init_checkpoint(
    backbone: Path | str,
    out: Path | str,
    *,
    seed: int = 0,
    bridging: BridgingConfig | None = None,
    spatial_decoder: SpatialDecoderConfig | DecoderOfWidth = SpatialDecoderConfig.fitting,
    dtype: torch.dtype | None = None,
    adapter: Path | str | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> Path:
    """Create a Bridge-STG checkpoint from the folder of a vision-language model.

    Args:
        backbone: a Hugging Face folder: config.json, safetensors, tokenizer.json.
        out: the folder to create.
        seed: seed of the new parts' weights.
        bridging: number of queries and tapped layers; None: the config's defaults.
        spatial_decoder: sizes of the spatial decoder, or a function that returns them for the LLM's width.
        dtype: dtype of the backbone's weights; None: unchanged.
        adapter: name or path of a LoRA adapter to merge; None: the only one in the folder, if any.
        overwrite: whether to replace a checkpoint at `out`.
        progress: called with the name of each stage.

    Returns:
        The checkpoint folder; its config says `"trained": false`.

    Raises:
        CheckpointError: the model is not supported, its tokenizer does not fit the prompt, or `out` exists.
    """
    backbone, out, report = Path(backbone), Path(out), progress or (lambda stage: None)
    require_new(out, source=backbone, overwrite=overwrite)
    bridging = bridging or BridgingConfig()
    config = new_config(backbone, bridging=bridging, spatial_decoder=spatial_decoder, report=report)
    report(sizes_of(config))
    load_tokenizer(backbone, config)
    config, store = open_weights(backbone, config, adapter=adapter)
    with torch.device("meta"):
        model = build_model(config, where=backbone / "config.json")
    check_weights(model, store, missing_ok=PART_KEYS)
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(out) as partial:
        partial.mkdir()
        files = weight_files(backbone)
        if set(store.files) <= set(files) and all(dtype in (None, tensor.dtype) for tensor in store.values()):
            report("weights: linked or copied")
            link_weights(files, partial)
        else:
            report("weights: written anew")
            write_weights(partial / WEIGHTS, store, store, dtype=dtype)
        report("bridging and spatial parts: new")
        save_files(new_parts(config, seed), partial)
        config.save(partial)
        shutil.copyfile(backbone / TOKENIZER, partial / TOKENIZER)
        check_weights(model, open_weights(partial, config)[1])
        replace_folder(partial, out)
    return out


def new_config(
    folder: Path, *, bridging: BridgingConfig, spatial_decoder: SpatialDecoderConfig | DecoderOfWidth, report: Report
) -> BridgeSTGConfig:
    """Return the config of a new checkpoint, with the prompt and frames of the model's family.

    A model whose chat template cannot be used has no section `text`; `report` is called with the reason.
    """
    check_folder(folder, "a plain vision-language model, as it is downloaded")
    values = read_json(folder / "config.json", hint=DOWNLOAD)
    if values.get("model_type") == MODEL_TYPE:
        message = f"{folder}: is already a Bridge-STG checkpoint; use it with `train` or `export`"
        raise CheckpointError("checkpoint.not_a_backbone", message)
    family = adapter_of(values)
    mean, std = image_statistics(folder, family)
    prompt, text = family.prompt(), None
    try:
        _, text = text_section(folder, values)
    except CheckpointError as error:
        if error.code not in ("checkpoint.bad_chat_template", "checkpoint.thinking_model"):
            raise
        report(f"the checkpoint cannot answer in text: {error}")
    if text is not None and not prompt.head.endswith(prompt.group_open):  # each group of a video closes itself
        text = dataclasses.replace(text, video_turn=text.video_turn.removeprefix(prompt.group_close))
    config = BridgeSTGConfig(
        backbone=values, bridging=bridging, frames=family.frames(), prompt=prompt, image_mean=mean, image_std=std,
        trained=False, text=text,
    ).checked(folder / "config.json")  # fmt: skip
    if callable(spatial_decoder):
        spatial_decoder = spatial_decoder(config.model_spec().language.hidden_size)
    return dataclasses.replace(config, spatial_decoder=spatial_decoder)


def sizes_of(config: BridgeSTGConfig) -> str:
    """Return one line with the sizes of the new parts."""
    language, decoder = config.model_spec().language, config.spatial_decoder
    taps = ", ".join(map(str, language.tapped_layers))
    return (
        f"{language.num_bridging_queries} bridging queries, tapped after layers {taps} of {language.num_layers}; "
        f"spatial decoder of width {decoder.width} with {decoder.num_layers} layers of {decoder.num_heads} heads"
    )


def link_weights(files: list[Path], folder: Path) -> None:
    """Link files, and the index of shards, into a folder, or copy them if it is on another file system."""
    index = files[0].parent / INDEX
    for file in [*files, index] if files[0].name != WEIGHTS else files:
        source = file.resolve()  # downloads are often links into a cache
        try:
            os.link(source, folder / file.name)
        except OSError:
            check_space(folder, source.stat().st_size)
            shutil.copyfile(source, folder / file.name)


def write_weights(
    path: Path, store: WeightStore, keys: Iterable[str], *, dtype: torch.dtype | None = None,
    changed: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Write the tensors of some keys to one file, one at a time.

    Args:
        path: the file to create.
        store: the weights, whose adapters are merged.
        keys: keys of the store.
        dtype: stored dtype; None: that of each tensor in the store.
        changed: tensors by key that replace those of the store.

    Raises:
        CheckpointError: a value is not finite in its stored dtype.
        BridgeError: the disk has too little free space.
    """
    layout = {key: (dtype or store[key].dtype, store[key].shape) for key in keys}
    check_space(path.parent, sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values()))
    changed = changed or {}

    def read(key: str) -> torch.Tensor:
        if key in changed:
            return cast_weight(changed[key], layout[key][0], name=key)
        return cast_weight(store.read(key), layout[key][0], name=f"{store[key].path}: {key}")

    write_safetensors(path, layout, read)


def check_space(folder: Path, needed: int) -> None:
    """Raise BridgeError if the disk of a `temporary_sibling` has too little free space."""
    require_space(target_of(folder), needed + SPARE_BYTES, purpose="the checkpoint")


def new_parts(config: BridgeSTGConfig, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return the new parts' tensors in float32, by file and key."""
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
        PART_FILES[0]: {f"bridging.queries.{name}": value for name, value in queries.state_dict().items()},
        PART_FILES[1]: {f"spatial_decoder.{name}": value for name, value in decoder.state_dict().items()},
    }
