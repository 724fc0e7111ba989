"""The TensorRT session on a pretended engine and device that hold to TensorRT's and CUDA's rules."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.backends.tensorrt.library import TensorRT
from bridge_stg.runtime.backends.tensorrt.session import TensorRTSession
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.cuda import Cuda
from tests.errors import raises
from tests.fakes.cuda import FakeCuda
from tests.fakes.tensorrt import Context, FakeTensorRT, make_plan

CAPACITY = 16
PROFILES = (
    {"B": (1, 1, 1), "L": (1, 4, 16), "S": (1, 16, 64)},  # prefill
    {"B": (1, 2, 3), "L": (1, 1, 3), "S": (1, 16, 64)},  # decode
)
SCHEDULES = {"late": (), "all at once": (0, 1, 2), "uploads hurry": (1,), "work hurries": (0,)}


def feeds(ids: list[list[int]], positions: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids), "cache_position": np.array(positions)}


class Machine:
    """A pretended device with TensorRT, and sessions of the tiny language model on it."""

    def __init__(self, language_models, *, eager=(), family="tensorrt", memory=2**32) -> None:
        self.graphs = language_models
        self.cuda = FakeCuda(eager=eager, memory=memory)
        self.device = DeviceContext(Cuda(self.cuda))
        self.module = FakeTensorRT(self.cuda)
        self.bindings = TensorRT(family, self.module)

    def plan(self, variant: str, **options) -> bytes:
        graph = self.graphs[variant]
        return make_plan(graph.path, graph.spec, options.pop("profiles", PROFILES), capacity=CAPACITY, **options)

    def open(self, variant: str, *, plan: bytes | Path | None = None, **options) -> TensorRTSession:
        plan = plan or self.plan(variant)
        return TensorRTSession(plan, self.graphs[variant].spec, self.device, self.bindings, **options)


@pytest.fixture(params=list(SCHEDULES))
def machine(request, language_models) -> Machine:
    return Machine(language_models, eager=SCHEDULES[request.param])


@pytest.fixture(params=["standard", "primitive"])
def variant(request) -> str:
    return request.param


@pytest.fixture
def session(machine, variant):
    with machine.open(variant) as opened:
        yield opened


@pytest.fixture
def on_cpu(language_models, variant):
    graph = language_models[variant]
    with OnnxRuntimeSession(graph.path, graph.spec, threads=1) as opened:
        yield opened


CALLS = (
    feeds([[1, 2, 3], [4, 5, 6]], [0, 0]),
    feeds([[7], [8]], [3, 2]),
    feeds([[9, 0], [1, 1]], [4, 3]),
    feeds([[2], [3]], [6, 6]),
)


def test_prefill_and_steps_equal_onnxruntime(session, on_cpu):
    ours, theirs = (s.allocate_cache(batch=2, capacity=CAPACITY) for s in (session, on_cpu))
    for call in CALLS * 3:
        expected = on_cpu.infer(call, cache=theirs)
        outputs = session.infer(call, cache=ours)
        assert set(outputs) == {"logits"} and isinstance(outputs["logits"], np.ndarray)
        np.testing.assert_allclose(outputs["logits"], expected["logits"], atol=1e-6)
    kept = ours.read()
    for name, value in theirs.read().items():
        np.testing.assert_allclose(kept[name], value, atol=1e-6)


@pytest.mark.parametrize("aliased", [None, 0])
def test_rows_that_no_profile_takes_together_run_one_after_the_other(machine, variant, on_cpu, aliased):
    with machine.open(variant, plan=machine.plan(variant, aliased=aliased)) as session:
        ours, theirs = (s.allocate_cache(batch=3, capacity=CAPACITY) for s in (session, on_cpu))
        long = feeds([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0], [2, 4, 6, 8, 0]], [0, 1, 2])
        for call in (long, feeds([[7], [8], [9]], [5, 6, 7]), long | {"cache_position": np.array([6, 7, 8])}):
            expected = on_cpu.infer(call, cache=theirs)["logits"]
            np.testing.assert_allclose(session.infer(call, cache=ours)["logits"], expected, atol=1e-6)
        kept = ours.read()
        for name, value in theirs.read().items():
            np.testing.assert_allclose(kept[name], value, atol=1e-6)


def test_a_plan_is_read_from_its_file(machine, variant, tmp_path):
    (tmp_path / "engine.plan").write_bytes(machine.plan(variant))
    with machine.open(variant, plan=tmp_path / "engine.plan") as session:
        cache = session.allocate_cache(batch=1, capacity=CAPACITY)
        assert session.infer(feeds([[1]], [0]), cache=cache)["logits"].shape[0] == 1


def test_buffers_are_allocated_once_and_the_cache_stays_where_it_is(session, machine):
    cache = session.allocate_cache(batch=2, capacity=CAPACITY)
    places = {name: buffer.address for name, buffer in cache.buffers.items()}
    for call in CALLS * 2:
        session.infer(call, cache=cache)
    before = machine.cuda.calls["cudaMalloc"]
    for call in CALLS * 4:
        session.infer(call, cache=cache)
    assert machine.cuda.calls["cudaMalloc"] == before
    assert {name: buffer.address for name, buffer in cache.buffers.items()} == places


def test_a_standard_step_moves_no_cache(machine):
    with machine.open("standard") as session:
        cache = session.allocate_cache(batch=1, capacity=CAPACITY)
        session.infer(feeds([[1]], [0]), cache=cache)
        before = machine.cuda.copied["cudaMemcpyDeviceToDevice"]
        session.infer(feeds([[2, 3]], [1]), cache=cache)
        assert machine.cuda.copied["cudaMemcpyDeviceToDevice"] == before


def test_an_engine_that_does_not_write_in_place_gives_new_buffers(machine, language_models):
    graph = language_models["standard"]
    with OnnxRuntimeSession(graph.path, graph.spec, threads=1) as on_cpu:
        theirs = on_cpu.allocate_cache(batch=2, capacity=CAPACITY)
        with machine.open("standard", plan=machine.plan("standard", aliased=0)) as session:
            ours = session.allocate_cache(batch=2, capacity=CAPACITY)
            for call in CALLS:
                expected = on_cpu.infer(call, cache=theirs)["logits"]
                np.testing.assert_allclose(session.infer(call, cache=ours)["logits"], expected, atol=1e-6)
            for name, value in theirs.read().items():
                np.testing.assert_allclose(ours.read()[name], value, atol=1e-6)


def test_a_primitive_step_writes_its_rows_alone(machine):
    with machine.open("primitive", cuda_graphs=False) as session:
        cache = session.allocate_cache(batch=2, capacity=CAPACITY)
        before = machine.cuda.copied["cudaMemcpyDeviceToDevice"]
        session.infer(feeds([[2, 3], [4, 5]], [1, 7]), cache=cache)
        moved = machine.cuda.copied["cudaMemcpyDeviceToDevice"] - before
        assert moved == 2 * (2 * 2 * 2 * 4) * 4  # key and value; rows × heads × positions × head_dim; 4 bytes


def test_steps_that_repeat_are_launched_as_cuda_graphs(machine, session, on_cpu):
    ours, theirs = (s.allocate_cache(batch=1, capacity=CAPACITY) for s in (session, on_cpu))
    session.infer(feeds([[1, 2, 3]], [0]), cache=ours)
    on_cpu.infer(feeds([[1, 2, 3]], [0]), cache=theirs)
    for position in range(3, 12):
        call = feeds([[position % 10]], [position])
        expected = on_cpu.infer(call, cache=theirs)["logits"]
        np.testing.assert_allclose(session.infer(call, cache=ours)["logits"], expected, atol=1e-6)
    assert session.graphs is not None and len(session.graphs) == 1
    assert machine.cuda.calls["cudaGraphLaunch"] == 7  # the first as it is, the second captured
    results = [session.infer(feeds([[t]], [12]), cache=ours)["logits"] for t in (4, 5)]
    assert np.abs(results[0] - results[1]).max() > 0.01  # the graph reads its inputs anew


def test_an_engine_that_cannot_be_captured_runs_all_the_same(machine, session, on_cpu):
    ours, theirs = (s.allocate_cache(batch=1, capacity=CAPACITY) for s in (session, on_cpu))
    for context in machine.module.engines[0].contexts:
        context.rejects_capture = True
    machine.module.engines[0].create_execution_context = refusing(machine.module.engines[0])
    for position in range(6):
        call = feeds([[position]], [position])
        expected = on_cpu.infer(call, cache=theirs)["logits"]
        np.testing.assert_allclose(session.infer(call, cache=ours)["logits"], expected, atol=1e-6)
    assert "cannot be captured" in session.graphs.capture_error and not machine.cuda.calls["cudaGraphLaunch"]


def refusing(engine):
    def create(how):
        context = type(engine).create_execution_context(engine, how)
        context.rejects_capture = True
        return context

    return create


def test_graphs_of_one_cache_do_not_serve_another(machine, session, on_cpu):
    caches = [(session.allocate_cache(batch=1, capacity=CAPACITY), on_cpu.allocate_cache(batch=1, capacity=CAPACITY))]
    caches.append(
        (session.allocate_cache(batch=1, capacity=CAPACITY), on_cpu.allocate_cache(batch=1, capacity=CAPACITY))
    )
    for position in range(8):
        for i, (ours, theirs) in enumerate(caches):
            call = feeds([[(3 * position + i) % 10]], [position])
            expected = on_cpu.infer(call, cache=theirs)["logits"]
            np.testing.assert_allclose(session.infer(call, cache=ours)["logits"], expected, atol=1e-6)
    assert len(session.graphs) == 2


def test_a_prefix_is_copied_into_rows(session, on_cpu):
    def run(opened):
        prefix = opened.allocate_cache(batch=1, capacity=CAPACITY)
        opened.infer(feeds([[3, 1, 4]], [0]), cache=prefix)
        batch = opened.allocate_cache(batch=3, capacity=CAPACITY)
        batch.copy_prefix(prefix, 3)
        return batch.read(), opened.infer(feeds([[1], [5], [9]], [3, 3, 3]), cache=batch)["logits"]

    (ours, logits), (theirs, expected) = run(session), run(on_cpu)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


def test_without_a_cache_the_pasts_are_fed_and_the_new_keys_returned(session, on_cpu):
    random = np.random.default_rng(0)
    past = {n: random.normal(size=(1, 2, CAPACITY, 4)).astype(np.float32) for n in ("past_key_0", "past_value_0")}
    ours, theirs = (opened.infer({**feeds([[1, 2]], [5]), **past}) for opened in (session, on_cpu))
    assert set(ours) == set(theirs) == {"logits", *session.graph.cache.written_names}
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


def test_concurrent_calls_with_caches_of_their_own(session, on_cpu):
    prompts = [[(7 * i + j) % 10 for j in range(6)] for i in range(8)]

    def decode(opened, ids: list[int]) -> np.ndarray:
        cache = opened.allocate_cache(batch=1, capacity=CAPACITY)
        return np.concatenate([opened.infer(feeds([[t]], [i]), cache=cache)["logits"][0] for i, t in enumerate(ids)], 1)

    expected = [decode(on_cpu, ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(lambda ids: decode(session, ids), prompts * 2), expected * 2, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_results_outlive_the_session_and_nothing_is_left_on_the_device(machine, variant):
    session = machine.open(variant)
    other = machine.open(variant)
    cache = session.allocate_cache(batch=1, capacity=CAPACITY)
    first = session.infer(feeds([[1, 2, 3]], [0]), cache=cache)["logits"]
    before = first.copy()
    for position in range(3, 8):
        session.infer(feeds([[7]], [position]), cache=cache)
    session.close()
    session.close()
    np.testing.assert_array_equal(first, before)
    assert other.infer(feeds([[1]], [0]), cache=other.allocate_cache(batch=1, capacity=8))["logits"].shape
    other.close()
    with raises("engine.closed", session.graph):
        session.infer(feeds([[1]], [0]), cache=cache)
    with raises("engine.closed"):
        cache.read()
    assert not machine.cuda.allocations and not machine.cuda.pinned and not machine.cuda.streams
    assert not machine.cuda.events


def test_outputs_that_stay_on_the_device(machine, variant, on_cpu):
    with machine.open(variant, on_device=["logits"]) as session:
        ours, theirs = (s.allocate_cache(batch=1, capacity=CAPACITY) for s in (session, on_cpu))
        calls = [feeds([[t]], [i]) for i, t in enumerate((1, 2, 3, 4, 5))]
        kept = [session.infer(call, cache=ours)["logits"] for call in calls]
        assert all(isinstance(array, DeviceArray) for array in kept)
        for array, call in zip(kept, calls, strict=True):  # later steps did not write over earlier results
            np.testing.assert_allclose(np.asarray(array), on_cpu.infer(call, cache=theirs)["logits"], atol=1e-6)


def test_inputs_of_other_libraries_are_read_in_place(machine, variant, on_cpu):
    class Foreign:
        """A tensor of another library on the same device."""

        def __init__(self, array: DeviceArray) -> None:
            self.array, self.stream = array, None

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

        def __dlpack__(self, *, stream=None):
            self.stream = stream
            return self.array.__dlpack__(stream=stream)

    with machine.open(variant) as session:
        ours, theirs = (s.allocate_cache(batch=2, capacity=CAPACITY) for s in (session, on_cpu))
        call = CALLS[0]
        foreign = Foreign(machine.device.upload(call["input_ids"]))
        before = machine.cuda.copied["cudaMemcpyDeviceToHost"]
        outputs = session.infer({**call, "input_ids": foreign}, cache=ours)
        assert foreign.stream == machine.device.stream
        assert machine.cuda.copied["cudaMemcpyDeviceToHost"] - before == outputs["logits"].nbytes
        np.testing.assert_allclose(outputs["logits"], on_cpu.infer(call, cache=theirs)["logits"], atol=1e-6)
        ids = machine.device.upload(np.array([[0, 1, 2, 3], [0, 4, 5, 6]]))[:, 1:]  # neither contiguous nor aligned
        again = session.infer({**call, "input_ids": ids}, cache=ours)["logits"]
        np.testing.assert_allclose(again, outputs["logits"], atol=1e-6)


def test_an_engine_has_the_ranges_of_its_profiles(machine, variant):
    with machine.open(variant) as session:
        assert session.graph.ranges["B"] == (1, 3) and session.graph.ranges["L"] == (1, 16)
        with raises("engine.out_of_range", "'input_ids'", "L = 17", "1 to 16"):
            session.infer(feeds([[1] * 17] * 2, [0, 0]), cache=session.allocate_cache(batch=2, capacity=CAPACITY))
        if variant == "standard":
            assert session.graph.ranges["S"] == (CAPACITY, CAPACITY)
            assert session.allocate_cache(batch=1, capacity=3).capacity == CAPACITY
            with raises("engine.out_of_range", "17 positions", "16"):
                session.allocate_cache(batch=1, capacity=17)


def test_a_call_that_no_profile_takes_in_parts_is_refused(machine, variant):
    profiles = ({**PROFILES[0], "L": (4, 8, 16)}, {**PROFILES[1], "B": (2, 2, 3)})
    with machine.open(variant, plan=machine.plan(variant, profiles=profiles)) as session:
        with raises("engine.out_of_range", "B = 1,", "L = 3", "B 1–1, L 4–16", "B 2–3, L 1–3"):
            session.infer(feeds([[1] * 3], [0]), cache=session.allocate_cache(batch=1, capacity=CAPACITY))


def test_engines_that_do_not_fit_are_rejected(machine, variant):
    spec = machine.graphs[variant].spec
    machine.device.open()  # held by whoever opens a chain, until its sessions are open
    with raises("engine.rejected_engine", "Serialization assertion", "build BUNDLE"):
        machine.open(variant, plan=b"no engine")
    other = "primitive" if variant == "standard" else "standard"
    with raises("engine.rejected_engine", "new_key_0"):
        machine.open(variant, plan=machine.plan(other))
    tensor = dataclasses.replace(spec.inputs[0], dtype="int32")
    graph = dataclasses.replace(spec, inputs=(tensor, *spec.inputs[1:]))
    plan = make_plan(machine.graphs[variant].path, graph, PROFILES, capacity=CAPACITY)
    with raises("engine.rejected_engine", "'input_ids'", "int32 [-1, -1]", "input_ids int64"):
        machine.open(variant, plan=plan)
    if variant == "standard":
        with raises("engine.rejected_engine", "'present_value_0'", "'no input'"):
            machine.open(variant, plan=machine.plan(variant, aliased=1))
    with machine.open(variant) as session:
        foreign = SimpleNamespace(batch=1, capacity=4, nbytes=0)
        with raises("engine.bad_cache", "SimpleNamespace"):
            session.infer(feeds([[1]], [0]), cache=foreign)
        with raises("engine.bad_input", "'input_ids'", "list"):
            session.infer(
                {**feeds([[1]], [0]), "input_ids": [[1]]}, cache=session.allocate_cache(batch=1, capacity=CAPACITY)
            )


def test_shapes_that_tensorrt_cannot_infer(session, monkeypatch):
    def fails(context):
        raise RuntimeError("IExecutionContext::inferShapes failed")

    cache = session.allocate_cache(batch=1, capacity=CAPACITY)
    monkeypatch.setattr(Context, "infer_shapes", fails)
    with raises("engine.failed", "inferShapes failed", "input_ids"):
        session.infer(feeds([[1]], [0]), cache=cache)


def test_without_memory_for_another_context_steps_are_not_captured(machine, session, on_cpu):
    machine.module.most_contexts = 1
    cache, plain = session.allocate_cache(batch=1, capacity=CAPACITY), on_cpu.allocate_cache(batch=1, capacity=CAPACITY)
    for position in range(4):
        ours = session.infer(feeds([[1]], [position]), cache=cache)
        expected = on_cpu.infer(feeds([[1]], [position]), cache=plain)
        np.testing.assert_allclose(ours["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    if session.graphs is not None and session.graphs.capture_error is not None:
        assert "no memory for another context" in session.graphs.capture_error and len(session.graphs) == 0
    with raises("engine.out_of_memory", "createExecutionContext"):
        machine.module.most_contexts = 0
        with machine.open("primitive") as other:
            other.infer(feeds([[1]], [0]), cache=other.allocate_cache(batch=1, capacity=CAPACITY))


def test_a_full_device(language_models):
    machine = Machine(language_models, memory=2**20)
    with machine.open("primitive") as session:
        with raises("engine.out_of_memory", "900 rows of 64 positions", "the GPU cannot allocate"):
            session.allocate_cache(batch=900, capacity=64)
        cache = session.allocate_cache(batch=1, capacity=64)  # the memory of the failed attempt was freed
        assert session.infer(feeds([[1]], [0]), cache=cache)["logits"].shape == (1, 2, 1, 4)


def test_rtx_shares_scratch_memory_captures_by_itself_and_keeps_its_kernels(language_models, tmp_path):
    kernels = tmp_path / "kernels.bin"
    for _ in range(2):
        machine = Machine(language_models, family="tensorrt_rtx")
        with machine.open("standard", kernels=kernels) as session:
            cache = session.allocate_cache(batch=1, capacity=CAPACITY)
            for position in range(4):
                session.infer(feeds([[1]], [position]), cache=cache)
            assert session.graphs is None and not machine.cuda.calls["cudaGraphLaunch"]
            config = machine.module.engines[0].contexts[0].config
            assert config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
        assert kernels.read_bytes() == b"kernels of this process"
    assert config.cache.blob == b"kernels of this process"  # the second process began with them
