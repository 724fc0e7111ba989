"""Comparison of boundaries, and replay of golden cases on a fake and on a real session."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec, Manifest, TensorSpec
from bridge_stg.runtime.bundle.writer import BundleWriter
from bridge_stg.runtime.parity.compare import as_contract, compare, format_table, replay, tolerance_of
from bridge_stg.runtime.parity.golden import Tolerance, read_case, write_case
from tests.errors import raises


def test_the_figures_of_a_boundary():
    boundary = compare("taps", np.array([3.0, 4.0]), np.array([3.0, 4.5], np.float32))
    assert (boundary.max_abs, boundary.rel_l2, boundary.scale) == (0.5, 0.1, 4.0)
    assert boundary.cosine == pytest.approx(27 / (5 * 29.25**0.5))
    assert not boundary.passed and boundary.dtype == "float32" and boundary.shape == (2,)
    assert compare("taps", np.array([3.0, 4.0]), np.array([3.0, 4.5]), tolerance=Tolerance(0.125, 0.1)).passed
    assert not compare("taps", np.array([3.0, 4.0]), np.array([3.0, 4.5]), tolerance=Tolerance(0.12, 0.1)).passed
    assert not compare("taps", np.array([3.0, 4.0]), np.array([3.0, 4.5]), tolerance=Tolerance(1.0, 0.09)).passed


def test_boxes_are_compared_by_their_overlap():
    reference = np.array([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.01, 0.01]])
    near = reference + np.array([0.0, 0.0, 0.004, 0.0])
    boundary = compare("boxes", reference, near, tolerance=Tolerance(1e-2, 1.0, least_iou=0.99), boxes=True)
    assert boundary.iou == pytest.approx(0.2 / 0.204) and not boundary.passed  # the tiny box is not counted
    assert compare("boxes", reference, near, tolerance=Tolerance(1e-2, 1.0, least_iou=0.98), boxes=True).passed
    assert compare("boxes", reference, near, tolerance=Tolerance(1e-2, 1.0, least_iou=0.99)).iou is None
    assert compare("boxes", reference[1:], near[1:], tolerance=Tolerance(1e-2, 1.0, 0.99), boxes=True).passed


def test_each_precision_has_its_own_tolerances():
    assert tolerance_of("fp32", "boxes") is None
    taps, boxes = tolerance_of("fp16", "taps"), tolerance_of("fp16", "boxes")
    assert taps is not None and boxes is not None
    assert taps.rel_l2 == 2e-2 and boxes.least_iou == 0.99 and taps.least_iou == 0
    assert boxes.max_abs < taps.max_abs and tolerance_of("bf16 twin", "taps") == tolerance_of("bf16", "taps") != taps


def test_inputs_get_the_dtypes_of_the_contract():
    inputs = (TensorSpec("x", "float16", ("N",)), TensorSpec("i", "int64", ("N",)))
    given = {"x": np.ones(2, np.float32), "i": np.ones(2, np.int64), "other": np.ones(2, np.float32)}
    found = as_contract(GraphSpec("g", "standard", inputs, (), 24), given)
    assert {name: str(array.dtype) for name, array in found.items()} == {
        "x": "float16", "i": "int64", "other": "float32",
    }  # fmt: skip


def test_the_table_of_tolerances_follows_the_dtype():
    reference = np.linspace(-1, 1, 50)
    near = reference * (1 + 1e-3)
    assert not compare("x", reference, near.astype(np.float32)).passed
    assert compare("x", reference, near.astype(np.float16)).passed
    assert compare("x", np.arange(3), np.arange(3)).passed
    assert not compare("x", np.arange(3), np.array([0, 1, 3])).passed
    assert not compare("x", np.array([True, False]), np.array([True, True])).passed


@pytest.mark.parametrize(
    ("reference", "actual", "problem"),
    [
        ([1.0, 2.0], [1.0], r"shape [1], expected [2]"),
        ([1.0], [1], "dtype int64, expected float64"),
        ([1.0], [np.nan], "1 NaN in the result"),
        ([np.nan], [np.nan], "1 NaN in the reference"),
        ([np.inf], [-np.inf], "infinities on one side only"),
        ([1.0], [np.inf], "infinities on one side only"),
    ],
)
def test_arrays_that_cannot_be_compared_never_pass(reference, actual, problem):
    boundary = compare("x", np.array(reference), np.array(actual), tolerance=Tolerance(np.inf, np.inf))
    assert boundary.problem == problem and not boundary.passed


def test_zeros_empty_arrays_and_equal_infinities_compare():
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert compare("x", zero, zero).passed and compare("x", zero, zero).cosine == 1.0
    assert not compare("x", zero, one).passed and compare("x", zero, one).cosine == 0.0
    assert compare("x", zero[:0], zero[:0]).passed
    masked = np.array([-np.inf, 2.0], np.float32)
    assert compare("x", masked, masked).passed


def test_the_table_names_the_failed_boundary():
    good, bad = compare("taps", np.ones(2), np.ones(2)), compare("logits", np.ones((1, 2)), np.ones((2, 1)))
    header, first, second = format_table([good, bad]).splitlines()
    assert header.split()[0] == "boundary" and first.endswith("ok")
    assert second.startswith("logits") and second.endswith("FAILED shape [2, 1], expected [1, 2]")


@pytest.fixture
def recorded(tmp_path, language_models, model_spec):
    """A function that writes a bundle with one golden case of given calls."""

    def write(calls, **options) -> Bundle:
        with BundleWriter(tmp_path / "bundle") as writer:
            for graph in language_models.values():
                writer.add_graph(graph.spec, graph.path)
            write_case(writer.folder / "golden" / "case", calls, kind="demo", **options)
            writer.finish(Manifest(spec=model_spec))
        return Bundle.load(tmp_path / "bundle")

    return write


@pytest.fixture(params=["standard", "primitive"])
def session(request, language_models):
    graph = language_models[request.param]
    with OnnxRuntimeSession(graph.path, graph.spec, threads=1) as opened:
        yield opened


def run_of_two_rows(language_models):
    """Calls of a prefix (one row), then of two rows after it, as the other lowering computes them."""
    graph = language_models["primitive"]
    calls, pasts = [], []
    with OnnxRuntimeSession(graph.path, graph.spec, threads=1) as reference:
        cache = reference.allocate_cache(batch=1, capacity=8)
        for ids, positions in (([[1, 2, 3]], [0]), ([[4], [5]], [3, 3]), ([[6], [7]], [4, 4])):
            if cache.batch != len(ids):
                rows = reference.allocate_cache(batch=len(ids), capacity=8)
                rows.copy_prefix(cache, 3)
                cache = rows
            feeds = {"input_ids": np.array(ids), "cache_position": np.array(positions)}
            pasts.append(cache.read())
            outputs = reference.infer(feeds, cache=cache)
            present = {name.replace("past", "present"): array for name, array in cache.read().items()}
            calls.append(("language_model", feeds, outputs, pasts[-1], present))
    return calls


def test_recorded_calls_continue_with_the_cache_of_earlier_calls(recorded, session, language_models):
    calls = [(graph, feeds, outputs) for graph, feeds, outputs, _, _ in run_of_two_rows(language_models)]
    bundle = recorded(calls, cache_capacity=8)
    seen = []
    boundaries = replay(bundle.golden_cases(), {"language_model": session}, progress=seen.append)
    assert [b.name for b in boundaries] == [f"case/language_model_{i}.logits" for i in range(3)]
    assert all(b.passed for b in boundaries), format_table(boundaries)
    assert seen == [f"case/language_model_{i}" for i in range(3)]
    assert replay(bundle, {}, graphs=["vision_encoder"]) == []


def test_recorded_pasts_and_presents_are_used(recorded, session, language_models):
    graph, feeds, outputs, past, present = run_of_two_rows(language_models)[2]
    bundle = recorded([(graph, feeds | past, outputs | present)])
    boundaries = replay(bundle, {"language_model": session})
    assert [b.name.split(".")[1] for b in boundaries] == ["logits", "present_key_0", "present_value_0"]
    assert all(b.passed for b in boundaries), format_table(boundaries)


def test_a_wrong_output_fails_unless_the_case_tolerates_it(recorded, session, language_models):
    graph, feeds, outputs, _, _ = run_of_two_rows(language_models)[0]
    wrong = {"logits": outputs["logits"] + np.float32(0.01)}
    (boundary,) = replay(recorded([(graph, feeds, wrong)], cache_capacity=8), {"language_model": session})
    assert not boundary.passed and boundary.max_abs == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("key", ["logits", "language_model.logits"])
def test_tolerances_of_the_case_count(recorded, session, language_models, key):
    graph, feeds, outputs, _, _ = run_of_two_rows(language_models)[0]
    wrong = {"logits": outputs["logits"] + np.float32(0.01)}
    bundle = recorded([(graph, feeds, wrong)], cache_capacity=8, tolerance={key: Tolerance(0.1, 0.1)})
    assert all(boundary.passed for boundary in replay(bundle, {"language_model": session}))


def test_cases_that_cannot_be_replayed(recorded, session, language_models, tmp_path):
    graph, feeds, outputs, _, _ = run_of_two_rows(language_models)[0]
    bundle = recorded([(graph, feeds, outputs | {"taps": outputs["logits"]})])
    with raises("engine.no_session", "'case'", "'language_model'"):
        replay(bundle, {})
    with raises("bundle.bad_golden_case", "language_model_0.npz", "in.past_"):
        replay(bundle, {"language_model": session})
    case = bundle.golden_cases()[0]
    (case / "case.json").write_text('{"kind": "demo", "cache_capacity": 8}')
    with raises("bundle.bad_golden_case", "'taps'", "language_model ("):
        replay(bundle, {"language_model": session})
    (case / "language_model_0.npz").write_bytes(b"PK no zip")
    with raises("bundle.bad_golden_case", "language_model_0.npz"):
        replay(bundle, {"language_model": session})
    np.savez(case / "language_model_0.npz", other=np.zeros(1))
    with raises("bundle.bad_golden_case", "'other'"):
        replay(bundle, {"language_model": session})
    (case / "case.json").write_text('{"kind": 1}')
    with raises("bundle.bad_golden_case", "case.json", "case.kind is 1"):
        read_case(case)
