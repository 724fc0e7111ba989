"""Operation counts, ratios, parity, growth powers, tables and plots against figures computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from speed.flops import decode_bytes, prefill_work, vision_work
from speed.limits import gemm_peaks
from speed.measure import REFERENCE
from speed.parity import parity
from speed.results.growth import exponent, last_step, summary
from speed.results.ratios import MEANINGS, Limits, best_peer, chain_overhead, main_ratios, met, peer_ratios, targets
from speed.results.report import MARKS, fill_in, flat_rows, markdown, missing_list, plots

TEXT = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 100,
}  # fmt: skip
VISION = {
    "hidden_size": 6, "intermediate_size": 10, "depth": 3, "patch_size": 2, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "out_hidden_size": 8, "deepstack_visual_indexes": [1],
}  # fmt: skip
LIMITS = Limits(bandwidth=1000.0, fp32=100.0, int8=400.0)
SIZES = {"groups": 5, "rows": 4, "columns": 6, "length": 4}
FACTS = {"qwen3_vl_0_5b/32": {"vision_config": VISION, "text_config": TEXT, "sizes": SIZES}}


def test_work_of_vision_against_a_hand_count() -> None:
    patches = 5 * 4 * 6
    linear = 3 * 2 * 2 * 2 * 6 + 3 * (6 * 18 + 6 * 6 + 6 * 10 + 10 * 6)  # patch embedding; qkv, out, two of the MLP
    merger = (24 * 24 + 24 * 8) * 2  # the last one and one deepstack level, a row for every four patches
    found = vision_work(VISION, groups=5, rows=4, columns=6)
    assert found.matmuls == 2 * patches * linear + 2 * (patches // 4) * merger
    assert found.attention == 3 * 5 * (2 * 24 * 24 * 6 * 2)  # scores and weighted values of 24 patches a group


def test_work_of_prefill_and_bytes_of_decode_against_a_hand_count() -> None:
    layer = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 16  # q, k and v, o, and the MLP's three
    work = prefill_work(TEXT, 3)
    assert work.matmuls == 2 * 3 * 2 * layer + 2 * 8 * 100
    assert work.attention == 2 * 4 * (1 + 2 + 3) * 16  # layers, two matmuls, pairs, channels of all heads
    keys = 2 * 2 * (2 * 4) * (9 + 1) * 4
    assert decode_bytes(TEXT, 9, "fp32") == 4 * (2 * layer + 800) + keys
    assert decode_bytes(TEXT, 9, "int8") == 2 * layer + 800 + keys
    assert decode_bytes(TEXT, 9, "int4") == (2 * layer + 800) * 0.625 + keys


def figures(**seconds: list[float]) -> dict[str, Any]:
    return {name: {"seconds": values, "tokens": 10 if name == "decode" else None} for name, values in seconds.items()}


def rows() -> dict[str, dict[str, dict[str, Any]]]:
    of = {
        REFERENCE: figures(vision=[8.0, 9.0, 30.0], prefill=[6.0], decode=[4.0], end_to_end=[20.0], prefill_text=[5.0]),
        "ours_fp32": figures(vision=[8.0], prefill=[7.0], decode=[2.0], prefill_text=[4.0]),
        "ours_int8": figures(
            vision=[2.0], prefill=[3.0], decode=[1.0], end_to_end=[5.0], queries_1=[4.0], queries_8=[9.0]
        ),
        "rival_fp32": figures(prefill=[3.0], decode=[3.0]),
        "rival_int8": figures(decode=[2.0]),
    }
    of["rival_fp32"]["prefill"]["text_alone"] = True
    graphs = {"vision_encoder": 2.0, "language_model": 1.5, "spatial_decoder": 0.5}
    of["ours_int8"]["end_to_end"]["details"] = [
        {"total": total, "graphs": graphs, "timings": {"decode_video": 0.75, "decode_fine": 0.25}, "first_token": 3.0}
        for total in (5.0, 5.2, 5.9)
    ]
    return {f"qwen3_vl_0_5b/32/{label}": values for label, values in of.items()}


def test_ratios_of_known_figures() -> None:
    found = main_ratios(rows(), LIMITS, FACTS)
    assert found["prefill_vision_int8_vs_torch_fp32"] == 15 / 5  # medians: 9 + 6 over 2 + 3
    assert found["end_to_end_int8_vs_torch_fp32"] == 4.0
    assert found["eight_queries_over_one"] == 2.25
    assert found["chain_overhead"] == pytest.approx(5.2 / 5.0 - 1, abs=1e-4)
    assert found["decode_int8_of_bandwidth"] == pytest.approx(decode_bytes(TEXT, 9, "int8") / 1000 / 0.1, abs=1e-4)
    assert found["torch_eager"] == pytest.approx((9 / 8 * 6 / 7 * 2 * 5 / 4) ** 0.25, abs=1e-3)
    assert found["rival"] == pytest.approx((3 / 4 * 3 / 2 * 2) ** (1 / 3), abs=1e-3)  # its prefill was of text
    assert best_peer(rows(), "fp32") == {"vision": 1.125, "prefill": 0.75, "decode": 1.5, "prefill_text": 1.25}
    assert found["fp32_vs_best_peer"] == 0.75 and found["int8_vs_best_peer"] == 2.0
    assert found["growth_of_last_doubling"] is None and found["decode_int4_vs_genai"] is None
    assert peer_ratios(rows())["rival"]["rows"] == {"fp32/prefill": 0.75, "fp32/decode": 1.5, "int8/decode": 2.0}


def test_ratios_without_figures_are_none() -> None:
    held = rows()
    held["qwen3_vl_0_5b/32/ours_int8"] = {"vision": {"seconds": [], "error": "it broke"}}
    found = main_ratios(held, LIMITS, FACTS)
    assert found["prefill_vision_int8_vs_torch_fp32"] is None and found["chain_overhead"] is None
    wanted = targets(LIMITS, vnni=True)
    assert wanted["prefill_vision_int8_vs_torch_fp32"] == {"least": 3.0}  # 0.75 · 400 / 100
    assert wanted["end_to_end_int8_vs_torch_fp32"] == {"least": 3.8}
    assert targets(LIMITS, vnni=False)["end_to_end_int8_vs_torch_fp32"] == {"least": 1.8}
    assert [met(value, {"least": 3.0}) for value in (None, 2.9, 3.0)] == [None, False, True]
    assert [met(value, {"most": 0.03}) for value in (0.04, 0.03, -0.1)] == [False, True, True]
    assert chain_overhead(held, "ours_int8", model="qwen3_vl_0_5b", frames=32) is None


def test_limits_are_the_best_measurements() -> None:
    def seen(bandwidth: float, fp32: float, torch: float, int8: float) -> dict[str, Any]:
        names = {"onnxruntime_fp32": fp32, "torch_fp32": torch, "onnxruntime_int8": int8}
        return {"bandwidth": bandwidth, "gemm": {name: {"flops": value} for name, value in names.items()}}

    assert Limits.best([seen(9, 3, 4, 20), seen(10, 5, 2, 10), seen(70, 1, 1, 1)]) == Limits(10, 5, 20)
    peaks = gemm_peaks(1, shapes=[(8, 16, 32)], seconds=0.01)
    assert all(peak["flops"] > 1e6 and peak["shape"] == [8, 16, 32] for peak in peaks.values()) and len(peaks) == 3


def test_parity_of_vectors_and_boxes() -> None:
    reference = {"logits": np.array([[1.0, 0, 0], [0, 2, 0]])}
    same = parity("decode", {"logits": reference["logits"] * 3}, reference)
    assert same == {"cosine": 1.0, "worst_cosine": 1.0, "same_choice": 1.0}
    other = parity("decode", {"logits": np.array([[1.0, 0, 0], [2, 2, 0]])}, reference)
    assert other["worst_cosine"] == pytest.approx(2**-0.5, abs=1e-6) and other["same_choice"] == 0.5
    assert "error" in parity("decode", {"logits": np.ones((1, 3))}, reference)
    assert parity("prefill", {}, reference) == {}
    boxes = {"times": np.array([0.0, 0.5]), "boxes": np.array([[0, 0, 10, 10], [0, 0, 10, 10.0]])}
    half = {"times": np.array([0.0]), "boxes": np.array([[0, 0, 10, 5.0]])}
    assert parity("end_to_end", half, boxes) == {"iou": 0.25, "worst_iou": 0.0}  # one frame half, one unanswered
    assert parity("spatial", {"boxes": np.full((1, 1, 4), 0.5)}, {"boxes": np.full((1, 1, 4), 0.5)})["iou"] == 1.0


def test_powers_of_growth() -> None:
    held = [{"axis": "frames", "x": x, "seconds": 3 * x**1.5} for x in (8, 16, 32)]
    held += [{"axis": "tube", "x": x, "seconds": 2.0, "language_steps": 5} for x in (8, 128)]
    found = summary(held)
    assert found["frames"]["exponent"] == found["frames"]["last_step"] == 1.5
    assert found["tube"]["exponent"] == 0.0 and found["tube"]["language_steps"] == [5, 5]
    assert exponent([(1, 1)]) is None and last_step([(1, 1)]) is None
    assert last_step([(1, 9.0), (4, 10.0), (8, 20.0)]) == 1.0


@pytest.fixture
def result() -> dict[str, Any]:
    runners = {"qwen3_vl_0_5b/ours_int8": {"load_s": 1.5, "precision": "int8; ort-cpu"}}
    return {
        "ratios": main_ratios(rows(), LIMITS, FACTS), "targets": targets(LIMITS, vnni=True), "threads": 2,
        "machine": {"cpu": "a CPU", "flags": ["avx2"]}, "measured": "today", "missing": {"peer": "does not install"},
        "limits": {"bandwidth": 1e10, "fp32": 1e11, "int8": 4e11},
        "rows": flat_rows(rows(), runners, FACTS, LIMITS), "runners": runners,
        "growth": [{"axis": "frames", "x": x, "seconds": 0.1 * x} for x in (8, 16)],
    }  # fmt: skip


def test_tables_contain_the_figures(result: dict[str, Any], tmp_path: Path) -> None:
    by_name = {(row["runner"], row["precision"], row["row"]): row for row in result["rows"]}
    vision = vision_work(VISION, 5, 4, 6)
    assert by_name["ours", "int8", "vision"]["of_limit"] == pytest.approx(
        (vision.matmuls / 400 + vision.attention / 100) / 2, abs=1e-4
    )
    for stage, name in (("decode", "decode_int8_of_bandwidth"), ("vision", "vision_int8_of_peak")):
        assert by_name["ours", "int8", stage]["of_limit"] == result["ratios"][name]
    text = markdown(result)
    line = next(line for line in text.split("\n") if line.startswith("| ours int8"))
    assert "| 3.00 |" in line and "| 10.0 (" in line and "| 1.5 |" in line
    rival = next(line for line in text.split("\n") if line.startswith("| rival fp32")).split(" | ")
    assert rival[2] == "–" and rival[3].startswith("3 (")  # text only, so it is in that column
    assert "`chain_overhead` | 0.04 | ≤ 0.03 | **not reached**" in text and "peer: does not install" in text
    document = tmp_path / "page.md"
    document.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n", encoding="utf-8")
    fill_in(document, "new")
    assert document.read_text() == f"before\n{MARKS[0]}\nnew\n{MARKS[1]}\nafter\n"
    document.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="speed: begin"):
        fill_in(document, "new")


def test_every_ratio_has_a_meaning(result: dict[str, Any]) -> None:
    assert set(MEANINGS) == set(result["targets"])
    lines = [line for line in markdown(result).split("\n") if line.startswith("| `")]
    assert len(lines) == len(result["ratios"]) and not any(line.endswith("|  |") for line in lines)


def test_runners_are_not_named_where_nothing_was_measured() -> None:
    reason = "all rows: no time"
    missing = {
        "demo/a, 8 frames": reason,
        "demo/b, 8 frames": reason,
        "demo/a, 32 frames": reason,
        "demo: c": "no disk",
    }
    lines = missing_list(missing, {("demo", "32 frames")})
    assert lines == ["- demo, 8 frames: all runners: no time", "- demo, 32 frames: a: no time", "- demo: c: no disk"]


def test_plots_are_written(result: dict[str, Any], tmp_path: Path) -> None:
    written = plots(result, tmp_path, model="qwen3_vl_0_5b", frames=32)
    assert [path.name for path in written] == ["speed_stages.svg", "speed_growth.svg"]
    assert all("<svg" in path.read_text(encoding="utf-8")[:600] for path in written)
