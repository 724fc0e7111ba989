"""The onnxruntime backend on tiny graphs: both cache contracts, dtypes, threads, and errors in words."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.manifest import GraphSpec, TensorSpec
from tests.errors import raises

VARIANTS = ("standard", "primitive")


def feeds(ids: list[list[int]], positions: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids), "cache_position": np.array(positions)}


@pytest.fixture(params=VARIANTS)
def session(request, language_models) -> OnnxRuntimeSession:
    graph = language_models[request.param]
    with OnnxRuntimeSession(graph.path, graph.spec, threads=1) as opened:
        yield opened


def expected_logits(session: OnnxRuntimeSession, ids: list[int]) -> np.ndarray:
    """The logits of one row as a single prefill of all its tokens."""
    cache = session.allocate_cache(batch=1, capacity=len(ids))
    return session.infer(feeds([ids], [0]), cache=cache)["logits"][0]


def test_the_cache_is_updated_in_place_and_bit_identical_to_a_copying_run(language_models):
    graph = language_models["standard"]
    session = OnnxRuntimeSession(graph.path, graph.spec, threads=1)
    plain = onnxruntime.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    cache = session.allocate_cache(batch=2, capacity=8)
    buffers = dict(cache.buffers)
    addresses = {name: (array.ctypes.data, cache.values[name].data_ptr()) for name, array in buffers.items()}
    past = {name: np.zeros((2, 2, 8, 4), np.float32) for name in buffers}
    for ids, positions in (([[1, 2, 3], [4, 5, 6]], [0, 0]), ([[7], [8]], [3, 2]), ([[9, 0], [1, 1]], [4, 3])):
        outputs = session.infer(feeds(ids, positions), cache=cache)
        logits, key, value = plain.run(None, {**feeds(ids, positions), **past})
        past = {"past_key_0": key, "past_value_0": value}
        assert set(outputs) == {"logits"}
        np.testing.assert_array_equal(outputs["logits"], logits)
        for name, array in past.items():
            np.testing.assert_array_equal(buffers[name], array)
    for name, (numpy_address, value_address) in addresses.items():
        assert numpy_address == value_address == cache.buffers[name].ctypes.data
        assert cache.buffers[name] is buffers[name]


def test_primitive_appends_rows_and_equals_standard(language_models):
    results = []
    for variant in VARIANTS:
        graph = language_models[variant]
        session = OnnxRuntimeSession(graph.path, graph.spec, threads=1)
        cache = session.allocate_cache(batch=2, capacity=9)
        calls = [feeds([[1, 2, 3], [4, 5, 6]], [0, 0]), feeds([[7], [8]], [3, 2]), feeds([[9, 0], [1, 1]], [4, 3])]
        results.append(([session.infer(call, cache=cache)["logits"] for call in calls], cache.read()))
    (standard, kept), (primitive, appended) = results
    for ours, theirs in zip(standard, primitive, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for name in kept:
        np.testing.assert_array_equal(kept[name], appended[name])


def test_decoding_in_steps_equals_one_prefill(session):
    ids = [3, 1, 4, 1, 5, 9]
    cache = session.allocate_cache(batch=1, capacity=16)
    steps = [session.infer(feeds([ids[:3]], [0]), cache=cache)["logits"]]
    steps += [session.infer(feeds([[token]], [3 + i]), cache=cache)["logits"] for i, token in enumerate(ids[3:])]
    np.testing.assert_allclose(np.concatenate(steps, axis=2)[0], expected_logits(session, ids), atol=1e-6)


def test_without_a_cache_the_pasts_are_fed_and_the_new_keys_returned(session):
    past = {name: np.zeros((1, 2, 4, 4), np.float32) for name in ("past_key_0", "past_value_0")}
    outputs = session.infer({**feeds([[1, 2]], [0]), **past})
    assert set(outputs) == {"logits", *session.graph.cache.written_names}
    assert not any(array.any() for array in past.values())


def test_a_prefix_is_copied_into_rows_of_another_size(session):
    prefix = session.allocate_cache(batch=1, capacity=4)
    session.infer(feeds([[3, 1, 4]], [0]), cache=prefix)
    batch = session.allocate_cache(batch=3, capacity=8)
    batch.copy_prefix(prefix, 3)
    assert not batch.buffers["past_key_0"][:, :, 3:].any()
    logits = session.infer(feeds([[1], [5], [9]], [3, 3, 3]), cache=batch)["logits"]
    for row, token in enumerate((1, 5, 9)):
        np.testing.assert_allclose(logits[row, :, 0], expected_logits(session, [3, 1, 4, token])[:, 3], atol=1e-6)
    larger = session.allocate_cache(batch=3, capacity=12)
    larger.copy_prefix(batch, 4)
    np.testing.assert_array_equal(larger.buffers["past_value_0"][:, :, :4], batch.buffers["past_value_0"][:, :, :4])


def test_a_cache_is_read_and_written_whole(session):
    cache = session.allocate_cache(batch=1, capacity=4)
    assert cache.nbytes == 2 * 2 * 4 * 4 * 4 and (cache.batch, cache.capacity) == (1, 4)
    session.infer(feeds([[1, 2]], [0]), cache=cache)
    other = session.allocate_cache(batch=1, capacity=4)
    other.write(cache.read())
    ours, theirs = (session.infer(feeds([[3]], [2]), cache=c)["logits"] for c in (cache, other))
    np.testing.assert_array_equal(ours, theirs)
    with raises("engine.bad_cache", "past_key_0", "float64 [1]", "float32 [1, 2, 4, 4]"):
        other.write({"past_key_0": np.zeros(1), "past_value_0": np.zeros(1)})


@pytest.mark.parametrize(
    ("length", "rows", "value"), [(5, 1, "5 positions"), (1, 3, "3 rows of a KV cache"), (-1, 1, "-1 positions")]
)
def test_a_prefix_that_does_not_fit_is_rejected(session, length, rows, value):
    source, target = session.allocate_cache(batch=rows, capacity=4), session.allocate_cache(batch=2, capacity=8)
    with raises("engine.bad_cache", value):
        target.copy_prefix(source, length)


def test_concurrent_calls_with_caches_of_their_own(session):
    prompts = [[(7 * i + j) % 10 for j in range(6)] for i in range(8)]
    expected = [expected_logits(session, ids) for ids in prompts]

    def decode(ids: list[int]) -> np.ndarray:
        cache = session.allocate_cache(batch=1, capacity=16)
        return np.concatenate(
            [session.infer(feeds([[t]], [i]), cache=cache)["logits"][0] for i, t in enumerate(ids)], 1
        )

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(decode, prompts * 5), expected * 5, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_switch_of_attention_is_put_back_once_a_session_is_open(kinds, monkeypatch):
    name, seen = "ORT_GQA_DISABLE_FLASH_ATTENTION", []
    opened = onnxruntime.InferenceSession

    def spying(*arguments, **options):
        seen.append(os.environ.get(name))
        return opened(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spying)
    for before in (None, "0"):  # whoever has set it is left to it
        monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
        OnnxRuntimeSession(*kinds).close()
        assert os.environ.get(name) == before
    assert seen == ["1", "0"]


WEIGHT_TEXT = """
<ir_version: 8, opset_import: ["" : 18]>
weight (float[N,2] x) => (float[N,3] y) <float[3,2] w = {1, 2, 3, 4, 5, 6}> {
    turned = Transpose(w)
    y = MatMul(x, turned)
}"""


@pytest.mark.parametrize(("precision", "found"), [("fp32", ["FusedMatMul"]), ("int4 w4", ["MatMul"])])
def test_transposed_weights_are_copied_only_where_folding_converts_them(tmp_path, monkeypatch, precision, found):
    path, saved = tmp_path / "weight.onnx", tmp_path / "optimized.onnx"
    onnx.save(onnx.parser.parse_model(WEIGHT_TEXT), path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(saved)
    monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: options)
    tensors = (TensorSpec("x", "float32", ("N", 2)),), (TensorSpec("y", "float32", ("N", 3)),)
    with OnnxRuntimeSession(path, GraphSpec("weight", "standard", *tensors, opset=18, precision=precision)) as session:
        np.testing.assert_array_equal(session.infer({"x": np.ones((1, 2), np.float32)})["y"], [[3, 7, 11]])
    assert [node.op_type for node in onnx.load(saved).graph.node] == found


def test_results_outlive_the_next_call_and_the_session(session):
    cache = session.allocate_cache(batch=1, capacity=8)
    first = session.infer(feeds([[1, 2, 3]], [0]), cache=cache)["logits"]
    before = first.copy()
    session.infer(feeds([[7, 8, 9]], [0]), cache=cache)
    session.close()
    np.testing.assert_array_equal(first, before)


DTYPES_TEXT = """
<ir_version: 8, opset_import: ["" : 18]>
kinds (float16[N,2] half, bool[N] mask, int64[N] index, uint8[N] byte)
=> (float16[N,2] doubled, bool[N] inverse, int64[N] next, uint8[N] same) {
    doubled = Add(half, half)
    inverse = Not(mask)
    next = Add(index, index)
    same = Identity(byte)
}"""


@pytest.fixture
def kinds(tmp_path: Path) -> tuple[Path, GraphSpec]:
    path = tmp_path / "kinds.onnx"
    onnx.save(onnx.parser.parse_model(DTYPES_TEXT), path)
    names = (
        ("half", "doubled", "float16"),
        ("mask", "inverse", "bool"),
        ("index", "next", "int64"),
        ("byte", "same", "uint8"),
    )
    dims = {"float16": ("N", 2)}
    inputs = tuple(TensorSpec(before, dtype, dims.get(dtype, ("N",))) for before, _, dtype in names)
    outputs = tuple(TensorSpec(after, dtype, dims.get(dtype, ("N",))) for _, after, dtype in names)
    return path, GraphSpec("kinds", "standard", inputs, outputs, opset=18)


def test_every_dtype_of_the_contract_goes_in_and_comes_out(kinds):
    session = OnnxRuntimeSession(*kinds)
    half = np.arange(12, dtype=np.float16).reshape(2, 6).T[:, ::-1]  # neither contiguous nor in order
    half.setflags(write=False)
    inputs = {"half": half, "mask": np.arange(6) > 2, "index": np.arange(6), "byte": np.arange(6, dtype=np.uint8)}
    outputs = session.infer(inputs)
    np.testing.assert_array_equal(outputs["doubled"], half * 2)
    np.testing.assert_array_equal(outputs["inverse"], np.arange(6) <= 2)
    np.testing.assert_array_equal(outputs["next"], np.arange(6) * 2)
    assert {name: str(array.dtype) for name, array in outputs.items()} == {
        "doubled": "float16", "inverse": "bool", "next": "int64", "same": "uint8",
    }  # fmt: skip
    empty = {name: array[:0] for name, array in inputs.items()}
    assert session.infer(empty)["doubled"].shape == (0, 2)
    with raises("engine.bad_cache", "kinds (standard)"):
        session.allocate_cache(batch=1, capacity=1)


def test_a_failure_inside_onnxruntime_names_graph_variant_and_shapes(session, capfd):
    bad = feeds([[1, 99]], [0])  # 99 is outside the embedding table
    with raises("engine.failed", f"{session.graph}: onnxruntime", "input_ids [1, 2]", "L = 2") as caught:
        session.infer(bad, cache=session.allocate_cache(batch=1, capacity=4))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_call_past_the_end_of_the_cache_is_rejected_before_it_runs(session):
    cache = session.allocate_cache(batch=2, capacity=4)
    with raises("engine.out_of_range", "row 1 is 3", "2 new positions", "4 positions"):
        session.infer(feeds([[1, 2], [3, 4]], [0, 3]), cache=cache)
    assert not any(buffer.any() for buffer in cache.buffers.values())


def test_use_after_close_and_foreign_caches_are_rejected(session):
    class Foreign:
        batch, capacity, nbytes = 1, 4, 0

    with raises("engine.bad_cache", "Foreign"):
        session.infer(feeds([[1]], [0]), cache=Foreign())
    with raises("engine.bad_cache", "NumpyKVCache", "Foreign"):
        session.allocate_cache(batch=1, capacity=4).copy_prefix(Foreign(), 1)
    with raises("engine.bad_cache", "0 rows of 4"):
        session.allocate_cache(batch=0, capacity=4)
    session.close()
    with raises("engine.closed", session.graph):
        session.infer(feeds([[1]], [0]))


def test_a_file_that_onnxruntime_rejects(tmp_path, kinds, capfd):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph at all")
    with raises("engine.rejected_graph", f"kinds (standard): onnxruntime {onnxruntime.__version__}", "broken"):
        OnnxRuntimeSession(path, kinds[1])
    for threads in (0, 1.5, "x", 10**11):
        with raises("options.out_of_range", repr(threads)):
            OnnxRuntimeSession(kinds[0], kinds[1], threads=threads)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"name": "other"}, ["half, other"]),
        ({"dtype": "float32"}, ["float16 ['N', 2]", "half float32"]),
        ({"dims": ("N", 3)}, ["half float16 [N, 3]"]),
        ({"dims": ("N", "M")}, ["half float16 [N, M]"]),
        ({"dims": ("N",)}, ["half float16 [N]"]),
    ],
)
def test_a_file_that_does_not_fit_its_manifest_entry(kinds, change, values):
    path, spec = kinds
    changed = dataclasses.replace(spec, inputs=(dataclasses.replace(spec.inputs[0], **change), *spec.inputs[1:]))
    with raises("engine.rejected_graph", *values):
        OnnxRuntimeSession(path, changed)
