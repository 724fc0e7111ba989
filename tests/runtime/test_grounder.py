from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bridge_stg.demo.tiny_model import demo_tokenizer_json
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.backends import choose as targets
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.results import VIDEO_STAGES
from bridge_stg.runtime.chain.spans import FineFrames
from bridge_stg.runtime.chain.spatial_pass import SpatialQuery, batches
from bridge_stg.runtime.errors import EngineError, QueryError, VideoError
from tests.errors import raises
from tests.fakes.answers import CAR, QUERIES, SCRIPT, same, write_video
from tests.fakes.chain import BRIDGING, TAPS, WIDTH, clip, fake_grounder, fake_spec, text_spec


def test_a_query_becomes_a_tube() -> None:
    with fake_grounder(script=SCRIPT) as grounder:
        found = grounder.ground(clip(), "the car")
    assert found.found and found.answer == CAR
    assert found.named_span == (2.0, 5.0) and found.span == (2.0, 5.0)
    assert found.tube is not None and found.boxes is not None
    np.testing.assert_allclose(found.tube.times, np.arange(8, 20) / 4)
    assert found.tube.visible.all() and found.size == (64, 48)
    np.testing.assert_allclose(found.boxes.times, np.arange(16, 40) / 8)
    np.testing.assert_array_equal(found.boxes.interpolated, np.arange(24) % 2 == 1)
    centre_y = found.tube.boxes[:, 1::2].mean(axis=1)
    np.testing.assert_allclose(centre_y, 48 * (0.2 + 0.6 * (200 * found.tube.times / 8).astype(int) / 255), atol=0.05)
    assert found.scores["absent"] < 1e-6 and found.scores["answer"] > 0.999
    assert found.scores["presence"] == pytest.approx(230 / 255)
    assert set(found.timings) == {
        "decode_video",
        "vision_coarse",
        "prefill",
        "answer",
        "decode_fine",
        "vision_fine",
        "spatial",
        "total",
    }
    assert sum(found.timings.values()) <= 2 * found.timings["total"]
    json.dumps(found.to_json(), allow_nan=False)


def test_taps_are_given_for_other_heads() -> None:
    grounder = fake_grounder(script=SCRIPT)
    with grounder.open(clip()) as video:
        car, cat, dog = video.ground_many(["the car", "the cat", "the dog"])
        when = video.span("the car")
    assert cat.taps is None and car.taps is not None and dog.taps is not None
    assert car.taps.shape == (TAPS, BRIDGING, WIDTH) and car.taps.base is None
    (call,) = grounder.sessions["spatial_decoder"].calls  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.stack([dog.taps, car.taps], axis=1), call["taps"])
    np.testing.assert_array_equal(when.taps, car.taps)
    assert "taps" not in car.to_json()


def test_presence_corrects_the_named_span() -> None:
    grounder = fake_grounder(script={"the car": "<1.2 seconds> to <5.2 seconds>"})
    found = grounder.ground(clip(present=(1.75, 4.5)), "the car")
    assert found.named_span == (1.0, 6.0) and found.span == (1.75, 4.5)
    nowhere = grounder.ground(clip(present=(9, 9)), "the car")
    assert nowhere.span == (1.0, 6.0) and nowhere.tube is not None and nowhere.boxes is not None
    assert not nowhere.tube.visible.any() and not nowhere.boxes.visible.any()


def test_the_margin_lets_the_span_grow_and_no_further() -> None:
    grounder = fake_grounder(script={"the car": "<3.2 seconds> to <3.2 seconds>"})
    assert grounder.ground(clip(present=(2.5, 4.75)), "the car").span == (2.5, 4.75)
    assert grounder.ground(clip(present=(0.0, 8.0)), "the car").span == (2.0, 5.0)


def test_an_absent_target_runs_no_spatial_pass() -> None:
    grounder = fake_grounder(script=SCRIPT)
    found = grounder.ground(clip(), "the cat")
    assert not found.found and found.answer == "none" and found.scores["absent"] > 0.999
    assert found.span is found.tube is found.boxes is found.named_span is None
    assert found.tokens["fine"] == 0 and not grounder.sessions["spatial_decoder"].calls  # type: ignore[attr-defined]
    forced = grounder.ground(clip(), "the cat", allow_none=False)
    assert forced.found and forced.scores["absent"] == 0


def test_visual_tokens_are_counted() -> None:
    tokens = fake_grounder(script=SCRIPT).ground(clip(), "the car").tokens
    assert tokens["coarse"] == 8 * 1 * 2  # 24 x 32 pixels at most, in cells of 16
    assert tokens["fine"] == 20 * 3 * 4  # the named 12 frames and 4 on each side
    assert tokens["dense"] == 32 * 3 * 4
    assert tokens["ratio"] == pytest.approx((16 + 240) / 384)


@pytest.mark.parametrize("kv_budget_bytes", [2**29, 3 * 768 * 40, 1])
def test_many_queries_give_the_results_of_each_alone(kv_budget_bytes: int) -> None:
    grounder = fake_grounder(script=SCRIPT, kv_budget_bytes=kv_budget_bytes)
    with grounder.open(clip()) as video:
        together = video.ground_many(QUERIES)
        for query, result in zip(QUERIES, together, strict=True):
            same(result, video.ground(query))
            same(result, fake_grounder(script=SCRIPT).ground(clip(), query))
    assert [result.found for result in together[:4]] == [True, True, False, True]


def test_many_queries_with_few_fine_frames_and_a_small_feature_budget() -> None:
    spec = fake_spec(max_fine_frames=8)
    grounder = fake_grounder(spec, SCRIPT, feature_budget_bytes=2000)
    with grounder.open(clip()) as video:
        together = video.ground_many(QUERIES)
        calls = grounder.sessions["spatial_decoder"].calls  # type: ignore[attr-defined]
        assert max(len(call["feature_map"]) for call in calls) <= 8
        for query, result in zip(QUERIES, together, strict=True):
            same(result, fake_grounder(spec, SCRIPT).ground(clip(), query))
    assert together[0].tube is not None
    np.testing.assert_allclose(np.diff(together[0].tube.times), 1.0)


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (48 * 4 * 3 * 5, 5), (2**20, 20)])
def test_fine_features_are_kept_within_their_budget(budget: int, kept: int) -> None:
    grounder = fake_grounder(script=SCRIPT, feature_budget_bytes=budget)
    with grounder.open(clip()) as video:
        video.ground("the car")
        assert video.features.nbytes == kept * 6 * 8 * 3 * 4  # patches, channels, bytes of fp32
        encoder: Any = grounder.sessions["vision_encoder"]
        encoder.calls.clear()
        video.ground("the car")
        assert sum(len(call["frames"]) for call in encoder.calls) == (0 if kept == 20 else 20 - kept)


def test_spatial_calls_are_as_few_as_their_frames_allow() -> None:
    def query(start: int, stop: int) -> SpatialQuery:
        indices = np.arange(start, stop)
        return SpatialQuery(FineFrames(indices, indices / 4, 0.25), np.zeros((1, 1, 1)))

    queries = [query(8, 12), query(0, 4), query(4, 8), query(12, 16), query(2, 6), query(40, 48)]
    assert list(batches(dict(enumerate(queries)), 8)) == [[1, 4, 2], [0, 3], [5]]
    assert [len(batch) for batch in batches(dict.fromkeys(range(35), query(0, 4)), 8)] == [16, 16, 3]
    assert list(batches({}, 8)) == []


def test_progress_counts_through_all_batches() -> None:
    reports: list[tuple[str, float, float | None]] = []
    with fake_grounder(script=SCRIPT, kv_budget_bytes=1).open(clip()) as video:
        video.ground_many(QUERIES, progress=lambda *values: reports.append(values))
    answered = [done for stage, done, total in reports if stage == "answer" and total == len(QUERIES)]
    assert answered == sorted(answered) and answered[-1] == len(QUERIES)
    assert {stage for stage, _, _ in reports} == {"answer", "decode_fine", "vision_fine", "spatial"}


def fake_bundle(monkeypatch: pytest.MonkeyPatch, folder: Path, fake: Grounder) -> dict[str, Any]:
    """Let `Grounder.load` find the sessions of a fake grounder, and return the options that they are opened with."""
    passed: dict[str, Any] = {}

    class FakeBundle:
        manifest = SimpleNamespace(spec=fake.spec, verified=True, fingerprint="f")
        path, tokenizer_path = folder, folder / "tokenizer.json"

    def open_sessions(bundle: Any, **options: Any) -> Any:
        passed.update(options)
        sessions = targets.Sessions(targets.ChosenBackend("fake", "1", {}))
        sessions.update(fake.sessions)
        return sessions

    monkeypatch.setattr(Bundle, "load", lambda path: FakeBundle())
    monkeypatch.setattr(targets, "open_sessions", open_sessions)
    return passed


def test_load_opens_the_sessions_of_the_bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = fake_grounder(script=SCRIPT)
    passed = fake_bundle(monkeypatch, tmp_path, fake)
    monkeypatch.setattr("bridge_stg.runtime.grounder.load_tokenizer", lambda path, spec: fake.tokenizer)
    with Grounder.load(tmp_path, variant="primitive", threads=2) as grounder:
        assert grounder.ground(clip(), "the car").answer == CAR
        assert grounder.target.backend == "fake"
        assert grounder.bundle == {"name": tmp_path.name, "fingerprint": "f"}
    assert passed == {"backend": "auto", "variant": "primitive", "threads": 2, "wait": True}


@pytest.mark.parametrize("heads", ["bridge", "text"])
def test_a_warm_up_runs_the_graphs_of_the_heads(heads: str) -> None:
    spec = text_spec(heads="bridge")
    with fake_grounder(spec, heads=heads) as grounder:
        sessions: Any = grounder.sessions
        grounder.warm_up()
        run = {name for name, session in sessions.items() if session.calls}
    assert run == set(sessions) - ({"spatial_decoder"} if heads == "text" else set())


def test_load_checks_the_tokenizer_and_closes_the_sessions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = fake_grounder(script=SCRIPT)
    fake_bundle(monkeypatch, tmp_path, fake)
    (tmp_path / "tokenizer.json").write_text(json.dumps(demo_tokenizer_json()))
    with raises("bundle.bad_tokenizer", "373", f"{fake.spec.language.vocab_size}"):  # the fake model has fewer ids
        Grounder.load(tmp_path)
    sessions: Any = fake.sessions
    assert all(session.closed for session in sessions.values())


def test_queries_share_the_prefix_and_the_fine_features() -> None:
    grounder = fake_grounder(script=SCRIPT)
    sessions: Any = grounder.sessions
    with grounder.open(clip()) as video:
        coarse = len(sessions["vision_encoder"].calls)
        first = video.ground("the car")
        encoded = len(sessions["vision_encoder"].calls)
        assert encoded > coarse
        same(video.ground("the car"), first)
        assert len(sessions["vision_encoder"].calls) == encoded
        again = video.ground("the car")
    for timings in (first.timings, again.timings):  # those of the video count in every total
        assert {"decode_video", "prefill"} <= set(timings)
        assert timings["total"] < 5 and 2 * timings["total"] >= sum(timings.values()) - 1e-9
    assert again.timings["total"] >= sum(first.timings[stage] for stage in VIDEO_STAGES)
    prefix = [call for call in sessions["language_model"].calls if call["visual_index"].any()]
    assert len(prefix) == 1
    assert all(len(call["frames"]) <= 3 for call in sessions["vision_encoder"].calls)


def test_the_decoder_gets_the_union_of_frames_and_a_mask_per_query() -> None:
    grounder = fake_grounder(script=SCRIPT)
    with grounder.open(clip()) as video:
        video.ground_many(["the car", "the cat", "the dog"])
    (call,) = grounder.sessions["spatial_decoder"].calls  # type: ignore[attr-defined]
    assert call["taps"].shape[:3] == (TAPS, 2, BRIDGING)
    np.testing.assert_allclose(call["frame_times"], np.arange(24) / 4)  # 0 to 3 s for the dog, 1 to 6 s for the car
    assert call["frame_mask"].sum(axis=1).tolist() == [12, 20]


def test_no_queries_and_bad_queries() -> None:
    with fake_grounder().open(clip()) as video:
        assert video.ground_many([]) == []
        with raises("query.empty", "query 1", kind=QueryError):
            video.ground_many(["the car", "  "])
        with raises("query.not_a_list", kind=QueryError):
            video.ground_many("the car")
        with raises("query.empty") as caught:
            video.ground("")
        assert "query 0" not in str(caught.value)


def test_a_bad_query_is_rejected_before_the_video_is_read() -> None:
    def frames() -> Any:
        raise AssertionError("the video was read")
        yield

    with raises("query.empty"):
        fake_grounder().ground(frames(), "")


def test_an_image_has_one_box_at_time_zero() -> None:
    image = clip(present=(0, 1))[0][1]
    found = fake_grounder().ground(image, "the car", allow_none=False)
    assert found.found and found.span == (0, 0.5) and found.answer == "<0.0 seconds> to <0.0 seconds>"
    assert found.boxes is not None and found.boxes.times.tolist() == [0] and not found.boxes.interpolated.any()
    assert found.tube is not None and len(found.tube) == 1


def test_a_video_file_gives_the_results_of_its_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", clip())
    grounder = fake_grounder(script=SCRIPT)
    with grounder.open(path) as video:
        from_file = video.ground_many(QUERIES[:4])
    for query, result in zip(QUERIES, from_file):
        from_frames = grounder.ground(clip(), query)
        assert (result.span, result.answer) == (from_frames.span, from_frames.answer)
        assert result.tokens == from_frames.tokens
        if result.tube is not None and from_frames.tube is not None:
            np.testing.assert_allclose(result.tube.times, from_frames.tube.times)
            np.testing.assert_allclose(result.tube.boxes[:, 1], from_frames.tube.boxes[:, 1], atol=0.5)


def test_a_slow_stream_has_one_box_per_frame() -> None:
    grounder = fake_grounder(script=SCRIPT)
    found = grounder.ground(clip(fps=1, present=(2, 5)), "the car")
    assert found.tube is not None and found.boxes is not None
    assert found.tube.times.tolist() == [2, 3, 4] == found.boxes.times.tolist()
    assert not found.boxes.interpolated.any()


def test_a_thinned_stream_marks_what_was_interpolated() -> None:
    grounder = fake_grounder(script=SCRIPT)
    found = grounder.ground(clip(), "the car", buffer_frames=8)
    assert found.tube is not None and found.boxes is not None
    assert set(np.diff(found.tube.times)) == {1.0} and found.span == (2.0, 5.0)
    assert (~found.boxes.interpolated).sum() == len(found.tube)


def test_a_prompt_that_does_not_fit() -> None:
    spec = fake_spec()
    small = dataclasses.replace(spec, language=dataclasses.replace(spec.language, max_positions=20))
    with raises("video.exceeds_prompt", 20, kind=VideoError):
        fake_grounder(small).open(clip())
    grounder = fake_grounder(spec)
    grounder.open(clip())
    prefix = 1 + max(int(call["positions"].max()) for call in grounder.sessions["language_model"].calls)  # type: ignore
    tight = dataclasses.replace(spec, language=dataclasses.replace(spec.language, max_positions=prefix + 160))
    with fake_grounder(tight).open(clip()) as video:
        video.ground("the car")
        with raises("query.too_long", prefix + 160, kind=QueryError):
            video.ground("the car " * 20)


def test_outputs_that_are_not_finite_are_engine_errors() -> None:
    for name, output in (
        ("spatial_decoder", "boxes"),
        ("vision_encoder", "feature_map"),
        ("spatial_decoder", "presence"),
    ):
        grounder = fake_grounder(script=SCRIPT)
        session: Any = grounder.sessions[name]
        run = session.run

        def broken(feeds: Any, cache: Any, run: Any = run, output: str = output) -> Any:
            outputs = run(feeds, cache)
            return {**outputs, output: np.full_like(outputs[output], np.nan)}

        session.run = broken
        with raises("engine.not_finite", name, output, kind=EngineError):
            grounder.ground(clip(), "the car")


def test_a_missing_session_is_named() -> None:
    with raises("engine.missing_session", "vision_encoder", kind=EngineError):
        Grounder({}, fake_spec(), None)  # type: ignore[arg-type]


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    root = Path(__file__).parents[2]
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); began = time.perf_counter();"
        "import bridge_stg.runtime; took = time.perf_counter() - began; assert took < 0.3, took;"
        "from bridge_stg.runtime import Grounder, Grounding, Tube, BridgeError;"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'av', 'PIL', 'tokenizers'} & set(sys.modules);"
        "assert not heavy, heavy; assert 'Grounder' in dir(bridge_stg.runtime)"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], cwd=root, check=True)
    with pytest.raises(ImportError):
        from bridge_stg.runtime import Nothing  # type: ignore[attr-defined]  # noqa: F401
