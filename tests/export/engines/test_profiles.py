"""Profiles cover the sizes of the chain, are consistent, and can be changed by YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge_stg.checkpoint.checkpoint import build_model
from bridge_stg.demo.tiny_model import demo_config
from bridge_stg.export.engines.profiles import PREFILL_TOKENS, Deployment, profiles_of, read_overrides
from bridge_stg.runtime.bundle.contracts import GRAPHS, graph_contract
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.video.sizes import frame_sizes
from tests.errors import raises
from tests.export.conftest import tiny_windowed_config


@pytest.fixture(scope="module", params=["demo", "windowed"])
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    config = demo_config() if request.param == "demo" else tiny_windowed_config()
    with torch.device("meta"):
        return build_model(config, where=Path(request.param)).spec


def contract(spec: ModelSpec, name: str, update: str = "in_place") -> GraphSpec:
    return graph_contract(name, spec, variant="standard", opset=24, cache_update=update)


def covers(profiles: Any, **sizes: int) -> bool:
    return any(all(r[s][0] <= size <= r[s][2] for s, size in sizes.items()) for r in profiles.values())


@pytest.mark.parametrize("update", ["in_place", "append"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_free_dim_has_a_range_in_order(spec: ModelSpec, name: str, update: str) -> None:
    graph = contract(spec, name, update)
    made = profiles_of(graph, spec)
    free = {dim for tensor in graph.inputs for dim in tensor.dims if isinstance(dim, str)}
    if update == "in_place":
        free.discard("S")
    for ranges in made.profiles.values():
        assert set(ranges) == free
        assert all(1 <= least <= usual <= largest for least, usual, largest in ranges.values())
    assert (made.capacity is not None) == (name == "language_model" and update == "in_place")


def test_prefill_and_decode_are_two_profiles_of_one_engine(spec: ModelSpec) -> None:
    made = profiles_of(contract(spec, "language_model"), spec)
    assert list(made.profiles) == ["prefill", "decode"]
    queries = spec.language.num_bridging_queries
    assert made.profiles["prefill"]["L"][2] == PREFILL_TOKENS and made.profiles["prefill"]["B"] == (1, 1, 1)
    assert covers(made.profiles, B=1, L=PREFILL_TOKENS, K=1, V=spec.frames.max_coarse_groups)
    assert covers({"decode": made.profiles["decode"]}, B=8, L=1, K=1, V=2)
    assert covers({"decode": made.profiles["decode"]}, B=8, L=6 + queries, K=queries, V=2)
    assert made.capacity == Deployment().positions(spec) and made.capacity % 256 == 0


def test_the_deployment_decides_capacity_and_rows(spec: ModelSpec) -> None:
    side = spec.vision.patch_size * spec.vision.merge_size
    per_group = spec.frames.coarse_max_pixels // side**2
    longest = Deployment(max_frames=spec.vision.temporal_patch_size * spec.frames.max_coarse_groups)
    assert spec.frames.max_coarse_groups * per_group < longest.positions(spec) <= spec.language.max_positions
    assert Deployment(max_frames=10**6).positions(spec) == longest.positions(spec)
    bounded = dataclasses.replace(spec, frames=dataclasses.replace(spec.frames, max_visual_tokens=100))
    assert longest.positions(bounded) < longest.positions(spec)
    small = profiles_of(contract(spec, "language_model"), spec, deployment=Deployment(max_frames=8, max_queries=3))
    assert small.capacity is not None and 4 * per_group < small.capacity < longest.positions(spec)
    assert small.profiles["decode"]["B"] == (1, 1, 3)
    one = profiles_of(contract(spec, "language_model"), spec, deployment=Deployment(max_queries=1))
    assert one.profiles["decode"]["B"] == (1, 1, 2)
    assert small.profiles["prefill"]["V"][2] == -(-8 // spec.vision.temporal_patch_size) * per_group + 1


@pytest.mark.parametrize("size", [(1080, 1920), (1920, 1080), (480, 480), (300, 1000), (40, 50)])
def test_any_usual_frame_fits_a_bucket(spec: ModelSpec, size: tuple[int, int]) -> None:
    vision = profiles_of(contract(spec, "vision_encoder"), spec).profiles
    spatial = profiles_of(contract(spec, "spatial_decoder"), spec).profiles
    patch = spec.vision.patch_size
    for frames, (height, width) in zip(("coarse", "fine"), frame_sizes(*size, spec), strict=True):
        patches = len(vision_tables(spec.vision, height // patch, width // patch)["rotary_cos"])
        area = getattr(spec.frames, f"{frames}_max_pixels") // patch**2
        groups = max(1, min(spec.frames.encoder_chunk_groups, spec.frames.encoder_chunk_patches // area))
        for count in (1, groups):
            assert covers(vision, G=count, height=height, width=width, N=patches), frames
    for count in (1, 16, 17, spec.frames.max_fine_frames):
        assert covers(spatial, B=16, F=count, h=height // patch, w=width // patch)


def test_patches_follow_from_height_and_width(spec: ModelSpec) -> None:
    for ranges in profiles_of(contract(spec, "vision_encoder"), spec).profiles.values():
        for place in range(3):
            assert ranges["N"][place] == ranges["height"][place] * ranges["width"][place] // spec.vision.patch_size**2


def test_overrides_change_profiles(spec: ModelSpec, tmp_path: Path) -> None:
    file = tmp_path / "profiles.yaml"
    side = spec.vision.patch_size * spec.vision.merge_size
    file.write_text(
        "capacity: 1000\nlanguage_model:\n  decode: {B: 1}\nspatial_decoder:\n  frames_16_portrait: null\n"
        "vision_encoder:\n"
        f"  square: {{G: [1, 4, 8], height: {6 * side}, width: [{5 * side}, {6 * side}, {7 * side}]}}\n"
    )
    overrides = read_overrides(file)
    before = profiles_of(contract(spec, "language_model"), spec)
    language = profiles_of(contract(spec, "language_model"), spec, overrides=overrides)
    assert language.capacity == 1000
    assert language.profiles["decode"] == {**before.profiles["decode"], "B": (1, 1, 1)}
    spatial = profiles_of(contract(spec, "spatial_decoder"), spec, overrides=overrides).profiles
    assert "frames_16_portrait" not in spatial and "frames_16_landscape" in spatial
    vision = profiles_of(contract(spec, "vision_encoder"), spec, overrides=overrides).profiles
    assert vision["square"]["N"] == (120, 144, 168) and vision["square"]["height"] == (6 * side,) * 3


@pytest.mark.parametrize("capacity", [1, 12, 600])
def test_no_step_is_longer_than_the_cache(spec: ModelSpec, capacity: int) -> None:
    made = profiles_of(contract(spec, "language_model"), spec, overrides={"capacity": capacity})
    for ranges in made.profiles.values():
        least, usual, largest = ranges["L"]
        assert 1 == least <= usual <= largest <= capacity


@pytest.mark.parametrize(
    ("graph", "overrides", "value"),
    [
        ("language_model", {"capacity": 0}, "0"),
        ("language_model", {"capacity": True}, "True"),
        ("language_model", {"capacity": None}, "None"),
        ("language_model", {"language": {"decode": {"B": 1}}}, "no graph language"),
        ("language_model", {"language_model": []}, "language_model is []"),
        ("language_model", {"language_model": None}, "language_model is None"),
        ("language_model", {"language_model": {"decode": {}}}, "decode is {}"),
        ("language_model", {"language_model": {"decode": {"B": [4, 1, 8]}}}, "decode.B is [4, 1, 8]"),
        ("language_model", {"language_model": {"decode": {"B": [0, 1, 8]}}}, "decode.B is [0, 1, 8]"),
        ("language_model", {"language_model": {"decode": {"B": "many"}}}, "decode.B is 'many'"),
        ("language_model", {"language_model": {"decode": {"X": 1}}}, "B, L, K, V"),
        ("language_model", {"language_model": {"mine": {"B": 1}}}, "L, K, V"),
        ("language_model", {"language_model": {"decod": None}}, "prefill, decode"),
        ("language_model", {"language_model": {1: {"B": 1}}}, "language_model.1"),
        ("language_model", {"capacity": 64, "language_model": {"decode": {"L": 65}}}, "65"),
        ("language_model", {"language_model": ["decode"]}, "['decode']"),
        ("language_model", {"language_model": {"prefill": None, "decode": None}}, "language_model"),
        ("vision_encoder", {"vision_encoder": {"fine_portrait": {"N": 4}}}, "G, height, width"),
        ("vision_encoder", {"vision_encoder": {"fine_portrait": {"height": 100}}}, "100 pixels"),
    ],
)  # fmt: skip
def test_wrong_profiles_are_rejected(spec: ModelSpec, graph: str, overrides: dict[str, Any], value: str) -> None:
    with raises("engine.bad_profile", "p.yaml", value, kind=EngineError):
        profiles_of(contract(spec, graph), spec, overrides=overrides, where="p.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("a: [", "YAML"), ("- 1", "[1]"), ("", "nothing"), ("{}", "{}"), ("vision: {}", "'vision'")]
)
def test_a_file_without_profiles(tmp_path: Path, text: str, value: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with raises("engine.bad_profile", "p.yaml", value, kind=EngineError):
        read_overrides(tmp_path / "p.yaml")
    with raises("engine.bad_profile", "none.yaml", kind=EngineError):
        read_overrides(tmp_path / "none.yaml")
