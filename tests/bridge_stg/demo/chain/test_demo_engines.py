"""A real TensorRT-RTX compiles every graph of the demo model in every precision, for all targets of its kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.recipes import RECIPES
from bridge_stg.export.engines.compile import compile_graph
from bridge_stg.export.engines.layers import plan_summary, read_plan_report
from bridge_stg.export.engines.profiles import profiles_of
from bridge_stg.export.engines.targets import TARGETS
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.export.parity.block_outputs import block_outputs, expose_outputs
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from tests.bridge_stg.demo.conftest import DEMO
from tests.calibration.golden_ranges import golden_ranges

pytestmark = pytest.mark.slow

SMS = sorted({sm for target in TARGETS if target.ahead_of_time for sm in target.sms})


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip(
        "tensorrt_rtx_bindings", reason='no TensorRT-RTX here: pip install -e ".[rtx]" to run this test'
    )


@pytest.fixture(scope="module")
def fp32(demo_bundle: Path) -> Bundle:
    return Bundle.load(demo_bundle)


@pytest.fixture(scope="module")
def fp16(rtx: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("demo_fp16") / "bundle"
    return Bundle.load(export_bundle(DEMO / "checkpoint", folder, dtype="fp16", verify=False))


@pytest.fixture(scope="module")
def int8(rtx: Any, fp32: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All three graphs in w8a8: the spatial decoder too, which stays in float by default."""
    folder = tmp_path_factory.mktemp("demo_int8")
    recipe = RECIPES["w8a8"].with_graph("spatial_decoder", "w8a8")
    ranges = {
        graph: {node: dataclasses.replace(found, scale=max(found.scale, 1e-6)) for node, found in of_graph.items()}
        for graph, of_graph in golden_ranges(fp32, folder / "ranges").items()
    }  # the few golden cases leave a unit of a box head at zero
    return Bundle.load(quantize_bundle(fp32, folder / "bundle", recipe=recipe, ranges=ranges))


@pytest.mark.parametrize("variant", ["standard", "primitive"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_graph_compiles(
    rtx: Any, precision: str, variant: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(precision)
    found = {name: _layers(rtx, bundle, name, variant, tmp_path) for name in GRAPHS}
    for name, counts in found.items():
        # The spatial decoder keeps its coordinates in fp32; of the vision encoder, the embedding of patches.
        others = {"fp32"} if precision == "int8" or name == "spatial_decoder" else set()
        assert precision in counts["products"] and set(counts["products"]) <= {precision, *others}, name
        assert counts["products"].get("fp32", 0) <= 1 or precision != "int8", name
    fused = {name: counts["attention"].get("fused", 0) for name, counts in found.items()}
    unfused = {name: counts["attention"].get("unfused", 0) for name, counts in found.items()}
    if precision == "fp16":
        assert fused["vision_encoder"] == 4 and not unfused["vision_encoder"]
        assert fused["spatial_decoder"] == 3  # over space; what attends over time and queries is fp32
        assert (fused["language_model"], unfused["language_model"]) == ((5, 0) if variant == "standard" else (0, 5))
    else:
        assert not any(fused.values())  # fp32 has no fused kernel, and int8 bundles of fp32 attend in fp32


def _layers(rtx: Any, bundle: Bundle, name: str, variant: str, folder: Path) -> dict[str, dict[str, int]]:
    """Compile for all targets at once: both profiles of the language model, one of the others."""
    graph = bundle.graph(name, variant)
    made = profiles_of(graph, bundle.manifest.spec)
    wanted = list(made.profiles) if name == "language_model" else list(made.profiles)[:1]
    profiles = {profile: made.profiles[profile] for profile in wanted}
    path = bundle.graph_path(name, variant)
    compiled = compile_graph(rtx, path, profiles, capacity=made.capacity, sms=SMS)
    (folder / name).write_bytes(memoryview(compiled.plan))
    return plan_summary(read_plan_report(folder / name, path))


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_with_block_outputs_compile(rtx: Any, fp16: Bundle, name: str, tmp_path: Path) -> None:
    """What `verify --bisect` compiles: every tensor between modules is an output."""
    graph = fp16.graph(name, "standard")
    found = block_outputs(fp16.graph_path(name, "standard"))
    exposed = expose_outputs(fp16, name, "standard", found, tmp_path)
    profiles = dict(list(profiles_of(graph, fp16.manifest.spec).profiles.items())[-1:])
    capacity = profiles_of(graph, fp16.manifest.spec).capacity
    compiled = compile_graph(rtx, exposed.graph_path(name, "standard"), profiles, capacity=capacity, sms=SMS[:1])
    assert len(found) > 40 and len(memoryview(compiled.plan)) > 10**6
