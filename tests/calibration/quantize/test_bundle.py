"""The tiny bundle in each recipe: valid, close to its float graphs, fused by onnxruntime, compiled by TensorRT."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.recipes import RECIPES, Recipe
from bridge_stg.calibration.report.assemble import drift_warnings
from bridge_stg.calibration.scoring.saturation_test import saturation_test
from bridge_stg.calibration.scoring.speed_gate import graph_bytes
from bridge_stg.calibration.search.block_sizes import size_of_blocks
from bridge_stg.export.graph import fuse_attention
from bridge_stg.export.graph.blocks import find_matmuls
from bridge_stg.export.parity.golden_cases import scene
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.backends.choose import choose, open_sessions
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import DECODE
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.chain.decode import feed
from bridge_stg.runtime.chain.prompt import Segment
from bridge_stg.runtime.parity.compare import replay
from bridge_stg.runtime.parity.verify import verify_bundle
from tests.calibration.conftest import Ranges
from tests.calibration.quantize.sizes import quantized_share
from tests.errors import raises
from tests.export.engines.real_tensorrt import compile_for, rtx, small_sizes

pytestmark = pytest.mark.slow

RANDOM_HEADS = ("spatial_decoder.box_heads.0", "spatial_decoder.box_heads.1", "spatial_decoder.reference")
"""The tiny model's boxes depend on these by large random weights, which no training has made robust."""

EXACT = saturation_test().passed


def exact(recipe: Recipe) -> Recipe:
    """Return the recipe that this CPU multiplies without saturation, as `calibrate` uses it."""
    return recipe if EXACT else recipe.with_reduced_range()


W8A8 = exact(RECIPES["w8a8"])
ALL_INT8 = exact(RECIPES["w8a8"].with_graph("spatial_decoder", "w8a8").with_float(*RANDOM_HEADS))
MADE: dict[str, Recipe] = {
    "w8a8": ALL_INT8,
    "w8": RECIPES["w8"],
    "w4": RECIPES["w4"],
    "w8a8-kv8": ALL_INT8.replace("language_model", cache="int8"),
    "w4-kv8": RECIPES["w4"].replace("language_model", cache="int8"),
}


@pytest.fixture(scope="module")
def bundles(exported: Bundle, ranges: Ranges, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("quantized")
    return {
        name: Bundle.load(quantize_bundle(exported, folder / name, recipe=recipe, ranges=ranges), check="all")
        for name, recipe in MADE.items()
    }


@pytest.fixture(params=list(MADE))
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> Bundle:
    return bundles[request.param]


def optimised(path: Path, folder: Path) -> Counter[str]:
    """Return the operators of a graph after onnxruntime's optimization."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    proto = onnx.load(folder / "optimised.onnx", load_external_data=False)
    return Counter(node.op_type for node in proto.graph.node)


def test_every_variant_passes_its_golden_cases(bundle: Bundle) -> None:
    """Against the torch reference; onnxruntime's int8 matmul rounds differently from the Q/DQ that it replaces."""
    replayed = verify_bundle(bundle.path, threads=1)
    assert set(replayed) == {"ort-cpu", "standard", "primitive"}
    for boundaries in replayed.values():
        by_graph = {b.name.split("/")[1].rpartition("_")[0]: b for b in boundaries if "logits" in b.name}
        assert by_graph["language_model"].rel_l2 > 1e-4  # it is quantized


def test_errors_rank_the_recipes(bundles: dict[str, Bundle]) -> None:
    """Weight-only int8 is closest to float, int4 least."""
    errors = {}
    for name in ("w8", "w8a8", "w4"):
        sessions = open_sessions(bundles[name], threads=1)
        found = [b.rel_l2 for b in replay(bundles[name], sessions, graphs=["language_model"]) if "taps" in b.name]
        errors[name] = float(np.mean(found))
        for session in sessions.values():
            session.close()
    assert errors["w8"] < errors["w8a8"] < errors["w4"]


def test_contracts(exported: Bundle, bundles: dict[str, Bundle]) -> None:
    for name, found in bundles.items():
        manifest, recipe = found.manifest, MADE[name]
        assert manifest.calibration is not None and manifest.verified
        assert from_json(Recipe, manifest.calibration["recipe"]) == recipe
        for graph in manifest.all_graphs():
            before = exported.manifest.graphs[graph.name].get(graph.variant)
            assert graph.precision == recipe.of(graph.name).precision("fp32")
            if before is None:
                assert (graph.variant, graph.derived_from) == ("ort-cpu", "standard")
                continue
            kv8 = graph.name == "language_model" and "kv8" in name
            assert [t.name for t in graph.inputs] == [t.name for t in before.inputs]
            assert {t.dtype for t in graph.inputs if t.name.startswith("past_")} == (
                {"int8" if kv8 else "float32"} if graph.cache else set()
            )
            assert graph.cache is None or graph.cache.dtype == ("int8" if kv8 else "float32")
            wanted = 21 if "w4" in name and graph.name == "language_model" else 0
            assert graph.opset == max(before.opset, wanted)
        proto = onnx.load(found.graph_path("language_model", "primitive"), load_external_data=False)
        assert proto.opset_import[0].version == found.graph("language_model", "primitive").opset


def test_float_graphs_are_copied(exported: Bundle, bundles: dict[str, Bundle]) -> None:
    before, after = (b.manifest.graphs["spatial_decoder"] for b in (exported, bundles["w4"]))
    assert before == after


def test_weights_take_a_quarter(exported: Bundle, bundles: dict[str, Bundle]) -> None:
    sizes = {name: size_of_blocks(found) for name, found in bundles.items()}
    plain = size_of_blocks(exported)
    assert quantized_share(exported) == 1 and set(plain) == set(sizes["w8a8"])
    assert 0.25 < quantized_share(bundles["w8a8"]) < 0.32  # channels of 32 values: a scale weighs more than in the demo
    assert quantized_share(bundles["w4"], "language_model") < 0.22
    for name, found in sizes.items():
        assert {n: b.fp32_bytes for n, b in found.items()} == {n: b.fp32_bytes for n, b in plain.items()}
        tied = found["language_model.embed_tokens"]
        assert "language_model.lm_head" not in found and tied.quantized  # the head's bytes are the table's
        matrices = sum(b.stored_bytes for b in found.values() if b.graph == "language_model")
        assert matrices <= graph_bytes(bundles[name], "language_model") < 1.35 * matrices, (
            name
        )  # norms and the bridging queries


def test_the_same_bytes_each_time(exported: Bundle, ranges: Ranges, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    again = Bundle.load(quantize_bundle(exported, tmp_path / "again", recipe=MADE["w4-kv8"], ranges=ranges))
    assert again.manifest.fingerprint == bundles["w4-kv8"].manifest.fingerprint


def test_onnxruntime_fuses_every_matmul(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Fused in the variant that it prefers; the other variants show why that one exists."""
    for graph in bundles["w8a8"].manifest.graphs:
        assert choose(bundles["w8a8"].manifest).variants[graph] == "ort-cpu"
        model = ir.load(bundles["w8a8"].graph_path(graph, "standard"))
        count = Counter(matmul.form for matmul in find_matmuls(model, graph))["int8"]
        assert count >= 12
        found = optimised(bundles["w8a8"].graph_path(graph, "ort-cpu"), tmp_path)
        assert found["MatMulIntegerToFloat"] == count, graph
    count = 3 * 7 + 1
    for name in ("w8", "w4"):
        found = optimised(bundles[name].graph_path("language_model", "ort-cpu"), tmp_path)
        assert found["MatMulNBits"] == count and not found["MatMul"]
        assert not found["DequantizeLinear"]
        standard = optimised(bundles[name].graph_path("language_model", "standard"), tmp_path)
        assert standard["MatMulNBits"] == count - 1
        assert standard["DequantizeLinear"] == 2  # the whole table, and the head: the reason for ort-cpu
    standard = optimised(bundles["w8a8"].graph_path("language_model", "standard"), tmp_path)
    assert standard["MatMulIntegerToFloat"] == 3 * 2 + 1  # o_proj and down_proj, whose inputs have one reader; the head


@pytest.mark.parametrize("case", ["w8a8", "w4", "w4 grouped"])
def test_a_second_form_of_the_weights_for_decoding(
    exported: Bundle, ranges: Ranges, bundles: dict[str, Bundle], tmp_path: Path, case: str
) -> None:
    name, _, grouped = case.partition(" ")
    recipe = MADE[name].replace("language_model", decode_form=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse_attention, "LEAST_GROUP", 2 if grouped else 3)  # the model has two heads per key head
        made = Bundle.load(quantize_bundle(exported, tmp_path / "b", recipe=recipe, ranges=ranges), check="all")
    count = 3 * 7 + 1
    assert optimised(made.graph_path("language_model", DECODE), tmp_path)["MatMulNBits"] == count
    graph = ir.load(made.graph_path("language_model", DECODE)).graph
    assert {node.attributes.get_int("bits") for node in graph if node.op_type == "MatMulNBits"} == {
        {"w8a8": 8, "w4": 4}[name]
    }
    operators = Counter(node.op_type for node in graph)
    assert (operators["Attention"], operators["GroupQueryAttention"]) == ((3, 0) if grouped else (0, 3))
    found = optimised(made.graph_path("language_model", "ort-cpu"), tmp_path)
    assert (found["MatMulNBits"], found["MatMulIntegerToFloat"]) == (1, count - 1)  # the head has few rows
    assert set(verify_bundle(made.path, threads=1)) >= {"ort-cpu", DECODE}
    logits, many = {}, {}
    for variant, bundle in ((None, made), (DECODE, made), ("ort-cpu", bundles[name])):
        sessions = open_sessions(bundle, variant=variant, threads=1)
        session = sessions["language_model"]
        cache = session.allocate_cache(batch=1, capacity=32)
        found = []
        for length, start in ((16, 0), (1, 16)):
            ids = np.arange(1, 1 + length)[None] + start
            part = Segment(ids[0], np.zeros(length, np.int64), np.tile(ids[0] - 1, (3, 1)), start + length)
            spec = bundle.manifest.spec
            visual = np.zeros((1 + spec.vision.deepstack_levels, 2, spec.language.hidden_size), np.float32)
            found.append(feed(session, cache, [part], [start], outputs=1, visual_tokens=visual)["logits"][0, 0])
        logits[variant] = found
        rows = session.allocate_cache(batch=6, capacity=32)
        many[variant] = feed(session, rows, [part] * 6, [16] * 6, outputs=1, visual_tokens=visual)["logits"]
        sessions.close()
    # One token is the decode form's, also in a cache that the other form has filled and in rows; many tokens are not.
    np.testing.assert_array_equal(many[None], many[DECODE])
    assert not np.array_equal(logits[None][0], logits[DECODE][0])
    for mine, other in zip(logits[None] * 2, logits[DECODE] + logits["ort-cpu"], strict=True):
        assert np.corrcoef(mine, other)[0, 1] > 0.99
    assert DECODE not in bundles[name].manifest.graphs["language_model"]  # its weights fit the CPU's caches


def test_the_chain_answers(exported: Bundle, bundle: Bundle) -> None:
    """Prefill, decode, bridging and boxes run, with int8 buffers too."""
    found = []
    for one in (exported, bundle):
        with Grounder.load(one.path, threads=1) as grounder:
            found.append(grounder.ground(scene(), "the red square", allow_none=False))
    assert found[1].boxes is not None and np.isfinite(found[1].boxes.boxes).all()


@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_tensorrt_compiles_it(bundle: Bundle, variant: str) -> None:
    rtx()
    sizes = small_sizes(bundle.manifest.spec.vision)
    for name, variants in bundle.manifest.graphs.items():
        graph = variants[variant]
        if graph.precision == "fp32" or (variant == "standard" and graph.cache and graph.cache.dtype == "int8"):
            continue  # TensorRT rejects int8 buffers that are updated in place, see `support`
        assert len(compile_for(bundle.graph_path(name, variant), sizes, capacity=256)) > 1000


def test_fp16(exported_fp16: Bundle, ranges: Ranges, tmp_path: Path) -> None:
    """Scales are then fp16, for which `primitive` needs a later opset."""
    recipe = W8A8.replace("language_model", cache="int8")
    path = quantize_bundle(exported_fp16, tmp_path / "b", recipe=recipe, ranges=ranges)
    for name in ("vision_encoder", "language_model"):
        for graph in Bundle.load(path).manifest.graphs[name].values():
            assert graph.precision.endswith(" fp16") and graph.opset >= 19
    assert set(verify_bundle(path, threads=1)) >= {"standard", "primitive"}


def test_narrow_ranges_give_a_warning_and_a_bundle_that_verifies(
    exported: Bundle, bundles: dict[str, Bundle], ranges: Ranges, tmp_path: Path
) -> None:
    """As blank samples give: the machine that made the bundle is not to blame."""
    narrow = {g: {n: dataclasses.replace(r, scale=r.scale / 20) for n, r in of.items()} for g, of in ranges.items()}
    made = quantize_bundle(exported, tmp_path / "b", recipe=W8A8, ranges=narrow)
    verify_bundle(made, threads=1)
    assert {"vision_encoder", "language_model"} <= {text.split()[2] for text in drift_warnings(Bundle.load(made))}
    assert not drift_warnings(bundles["w8"])


def test_blocks_that_stay_float(exported: Bundle, ranges: Ranges, tmp_path: Path) -> None:
    kept = ["language_model.layers.1.mlp", "vision_encoder.merger", "language_model.lm_head"]
    path = quantize_bundle(exported, tmp_path / "b", recipe=W8A8.with_float(*kept), ranges=ranges)
    blocks = size_of_blocks(Bundle.load(path))
    assert {name for name, block in blocks.items() if not block.quantized and block.graph != "spatial_decoder"} == {
        "language_model.layers.1.mlp", "vision_encoder.merger", "language_model.embed_tokens",
    }  # fmt: skip
    verify_bundle(path, threads=1)
    all_kept = W8A8.with_float(*(name for name, block in blocks.items() if block.graph == "vision_encoder"))
    path = quantize_bundle(exported, tmp_path / "c", recipe=all_kept, ranges=ranges)
    assert Bundle.load(path).manifest.graphs["vision_encoder"] == exported.manifest.graphs["vision_encoder"]


def test_invalid_arguments(exported: Bundle, bundles: dict[str, Bundle], ranges: Ranges, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with raises("calibration.unknown_block", "vision_encoder.blocks.9.mlp"):
        quantize_bundle(exported, out, recipe=RECIPES["w8"].with_float("vision_encoder.blocks.9.mlp"), ranges=ranges)
    with raises("bundle.precision", "int8 w8a8", "--dtype fp32"):
        quantize_bundle(bundles["w8"], out, recipe=RECIPES["w8"], ranges=ranges)
    with raises("bundle.no_variant", "ort-cpu"):
        quantize_bundle(exported, out, recipe=RECIPES["w8"], ranges=ranges, variants=["ort-cpu"])
    with raises("calibration.missing_range"):
        quantize_bundle(exported, out, recipe=W8A8, ranges={})
    with raises("calibration.missing_range", "past_key_0", "language_model"):
        bare = {g: {n: r for n, r in of.items() if "past" not in n} for g, of in ranges.items()}
        quantize_bundle(exported, out, recipe=RECIPES["w8"].replace("language_model", cache="int8"), ranges=bare)
    assert list(tmp_path.iterdir()) == []  # no partial bundle


def test_one_variant(exported: Bundle, ranges: Ranges, tmp_path: Path) -> None:
    path = quantize_bundle(exported, tmp_path / "b", recipe=RECIPES["w8"], ranges=ranges, variants=["primitive"])
    bundle = Bundle.load(path)
    assert {graph.variant for graph in bundle.manifest.all_graphs()} == {"primitive"}
    assert choose(bundle.manifest).variants["language_model"] == "primitive"
