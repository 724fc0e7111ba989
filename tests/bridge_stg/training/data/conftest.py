"""The demo's rules and tokenizer, and small datasets in their published layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.demo.tiny_model import demo_config
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.training.data.clips import ClipBatches
from bridge_stg.training.data.index import check_clips
from bridge_stg.training.data.mixture import Mixture
from bridge_stg.training.data.sources import read_clips
from bridge_stg.training.recipe import Augmentation, DataRecipe, Source
from tests.evaluation import official

Make = Callable[..., ClipBatches]


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    """Return the demo's rules with smaller frames, so that those of the datasets can be scaled."""
    spec = demo_config().model_spec()
    sizes = {"coarse_min_pixels": 32 * 32, "fine_min_pixels": 32 * 32, "fine_max_pixels": 96 * 96}
    return replace(spec, frames=replace(spec.frames, **sizes))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Return each dataset as a source, with media in which a red square moves."""
    sources = {}
    for name, build in official.ALL.items():
        files = build(tmp_path_factory.mktemp(name), official.video)
        annotations = tuple(map(str, files.annotations))
        sources[name] = Source(annotations, dataset=name, media=str(files.media), split=files.split)
    return sources


@pytest.fixture
def make(spec: ModelSpec, tokenizer_path: Path) -> Make:
    """Return a function that makes batches of sources; other arguments are those of the recipe and the mixture."""

    def batches(*sources: Source, seed: int = 0, stage: int = 0, clips: int = 1, **options: Any) -> ClipBatches:
        options["augment"] = Augmentation(**options.pop("augment", {}))
        recipe = DataRecipe(**{"sources": sources, "max_broken": 0.9, **options})
        index = check_clips(read_clips(sources), sources, spec, max_broken=recipe.max_broken)
        return ClipBatches(spec, tokenizer_path, Mixture(index, recipe, seed, stage, clips))

    return batches
