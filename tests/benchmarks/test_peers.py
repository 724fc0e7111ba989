"""Runners of other runtimes without the runtimes: the protocol, the folder they read, their installation."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "speed" / "peers"


@pytest.fixture(autouse=True, scope="module")
def importable() -> Iterator[None]:
    """Make the modules of the runners' folder importable by their bare names."""
    sys.path.insert(0, str(PEERS))
    yield
    sys.path.remove(str(PEERS))


def answers_of(load: Any, *requests: Any) -> list[dict[str, Any]]:
    """Return the answers to requests; a str is sent unchanged."""
    from protocol import answer_requests

    answers = io.StringIO()
    lines = [request if isinstance(request, str) else json.dumps(request) for request in requests]
    answer_requests(load, io.StringIO("\n".join(lines) + "\n"), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def load_request(folder: Path, **changes: Any) -> dict[str, Any]:
    model = {"name": "tiny", "checkpoint": str(folder), "folder": str(folder), "bundles": {"fp32": "bundle"}}
    return {"do": "load", "model": model, "precision": "fp32", "threads": 2} | changes


def doubling(model: Any, precision: str, threads: int) -> Any:
    """A peer whose only row doubles its input and adds the number of repetitions since `before`."""
    from protocol import Loaded, PeerError, Work

    if precision != "fp32":
        raise PeerError(f"not in {precision},\nsorry")
    state = {"calls": 0}

    def row(inputs: Any) -> Any:
        def timed() -> dict[str, np.ndarray]:
            state["calls"] += 1
            return {"logits": inputs["input_ids"] * 2 + state["calls"]}

        return Work(timed, lambda: state.update(calls=0), tokens=inputs["input_ids"].shape[1])

    return Loaded({"prefill_text": row}, f"{model.bundles['fp32']} on {threads}", ("numpy",), build_s=0.0)


def test_a_runner_answers_each_request_with_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=np.arange(6)[None])
    run = {"do": "run", "row": "prefill_text", "inputs": str(tmp_path / "in.npz"), "repeat": 3}
    outputs = {"outputs": str(tmp_path / "out.npz")}
    loaded, first, second = answers_of(doubling, load_request(tmp_path), run | outputs, run | {"outputs": None})
    assert loaded["ok"] and loaded["rows"] == ["prefill_text"] and loaded["precision"] == "bundle on 2"
    assert loaded["versions"] == {"numpy": np.__version__} and loaded["load_s"] >= 0
    assert first["ok"] and first["tokens"] == 6 and len(first["seconds"]) == len(first["cpu_seconds"]) == 3
    assert second["ok"] and all(seconds > 0 for seconds in second["seconds"])
    if sys.platform == "linux":
        assert first["peak_bytes"] > 2**20
    with np.load(tmp_path / "out.npz") as file:
        assert (file["logits"] == np.arange(6)[None] * 2 + 1).all()  # reset before each repetition


def test_an_unsupported_request_is_a_one_line_error_and_the_next_one_is_answered(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=np.arange(6)[None])
    run = {"do": "run", "row": "prefill_text", "inputs": str(tmp_path / "in.npz"), "repeat": 1, "outputs": None}
    answers = answers_of(
        doubling,
        run,
        "no JSON",
        load_request(tmp_path, precision="int4"),
        load_request(tmp_path),
        run | {"row": "vision"},
        run | {"inputs": str(tmp_path / "none.npz")},
        {"do": "dance"},
        run,
        {"do": "quit"},
        run,
    )
    assert [answer["ok"] for answer in answers] == [False, False, False, True, False, False, False, True]
    errors = [answer.get("error", "") for answer in answers]
    assert "nothing is loaded" in errors[0] and "JSONDecodeError" in errors[1]
    assert errors[2] == "PeerError: not in int4, sorry"
    assert "'vision'" in errors[4] and "none.npz" in errors[5] and "'dance'" in errors[6]
    assert not any("\n" in error for error in errors)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from convert.qwen3_folder import write_qwen3_folder

    folder = tmp_path_factory.mktemp("peers") / "qwen3"
    return write_qwen3_folder(PEERS.parents[2] / "assets" / "demo" / "checkpoint", folder)


def test_the_text_part_computes_the_same_as_the_whole_model(demo_folder: Path) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    from bridge_stg.checkpoint.checkpoint import load_checkpoint

    checkpoint = PEERS.parents[2] / "assets" / "demo" / "checkpoint"
    whole = load_checkpoint(checkpoint)
    alone = Qwen3ForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 367, (1, 40)))
    with torch.inference_mode():
        got = alone(input_ids=ids).logits[0, -1].numpy()
    expected = text_logits(whole, ids.numpy())
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def text_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Return the logits [vocab] after text ids [1, L], by the runtime's own calls of the torch model."""
    from bridge_stg.model.torch_session import torch_grounder
    from bridge_stg.runtime.chain.decode import feed
    from bridge_stg.runtime.chain.prompt import text_segment

    session = torch_grounder(model).sessions["language_model"]
    dims = next(tensor.dims for tensor in session.graph.inputs if tensor.name == "visual_tokens")
    nothing = np.zeros((int(dims[0]), 2, int(dims[2])), np.float32)
    cache = session.allocate_cache(batch=1, capacity=ids.shape[1])
    outputs = feed(session, cache, [text_segment(ids[0].tolist(), 0)], [0], outputs=1, visual_tokens=nothing)
    logits: np.ndarray = outputs["logits"][0, 0]
    return logits


def test_a_folder_is_written_once_and_renamed_when_complete(demo_folder: Path, tmp_path: Path) -> None:
    from convert.qwen3_folder import write_qwen3_folder

    before = (demo_folder / "model.safetensors").stat().st_mtime_ns
    write_qwen3_folder(PEERS.parents[2] / "assets" / "demo" / "checkpoint", demo_folder)
    assert (demo_folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileNotFoundError):
        write_qwen3_folder(tmp_path, tmp_path / "qwen3")
    assert not (tmp_path / "qwen3").exists()


def test_checkpoints_of_other_families_are_rejected(tmp_path: Path) -> None:
    from convert.qwen3_folder import write_qwen3_folder
    from protocol import PeerError

    (tmp_path / "config.json").write_text(json.dumps({"backbone": {"model_type": "qwen2_5_vl"}}), encoding="utf-8")
    with pytest.raises(PeerError, match="qwen2_5_vl"):
        write_qwen3_folder(tmp_path, tmp_path / "qwen3")
    (tmp_path / "config.json").write_text(json.dumps({"backbone": {"model_type": "qwen3_vl"}}), encoding="utf-8")
    with pytest.raises(PeerError, match="none"):
        write_qwen3_folder(tmp_path, tmp_path / "qwen3")
    assert not (tmp_path / "qwen3").exists()


def test_stored_values_are_read_without_torch(tmp_path: Path) -> None:
    import torch
    from convert.safetensors_file import tensors
    from safetensors.torch import save_file

    values = torch.linspace(-3, 3, 24).reshape(4, 6)
    kinds = {"a": torch.float32, "b": torch.float16, "c": torch.bfloat16}
    save_file({name: values.to(dtype) for name, dtype in kinds.items()}, tmp_path / "x.safetensors")
    read = dict(tensors(tmp_path / "x.safetensors"))
    for name, dtype in kinds.items():
        assert read[name].dtype == np.float32 and (read[name] == values.to(dtype).float().numpy()).all()


def test_a_built_folder_is_complete_or_absent(tmp_path: Path) -> None:
    from built import built
    from protocol import PeerError

    write = "import sys, pathlib; pathlib.Path(sys.argv[1], 'model').write_text('x'); sys.exit(int(sys.argv[2]))"
    with pytest.raises(PeerError, match="building thing failed"):
        built(tmp_path / "thing", lambda out: ["-c", write, str(out), "1"])
    assert list(tmp_path.iterdir()) == []
    assert built(tmp_path / "thing", lambda out: ["-c", write, str(out), "0"]) > 0
    assert (tmp_path / "thing" / "model").read_text() == "x"
    assert built(tmp_path / "thing", lambda out: ["-c", "raise SystemExit(1)"]) == 0.0


def test_an_environment_is_made_once_and_again_when_its_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import install

    ran: list[list[str]] = []

    def run(name: str, command: list[str], environment: dict[str, str]) -> None:
        ran.append(command)
        if command[2] == "venv":
            (Path(command[3]) / "bin").mkdir(parents=True)
            (Path(command[3]) / "bin" / "python").touch()

    monkeypatch.setattr(install, "_run", run)
    requirements, venvs = tmp_path / "requirements", tmp_path / "venvs"
    requirements.mkdir()
    (requirements / "peer.txt").write_text("peer==1.0\n")
    (requirements / "peer.nodeps.txt").write_text("other==1.0\n")
    python = install.install("peer", requirements=requirements, venvs=venvs)
    assert python == venvs / "peer" / "bin" / "python"
    assert [Path(command[-1]).name for command in ran] == ["peer", "peer.txt", "peer.nodeps.txt"]
    assert ["--no-deps" in command for command in ran] == [False, False, True]
    install.install("peer", requirements=requirements, venvs=venvs)
    assert len(ran) == 3
    (requirements / "peer.nodeps.txt").write_text("other==1.1\n")
    install.install("peer", requirements=requirements, venvs=venvs)
    assert len(ran) == 6


def test_a_peer_that_does_not_install_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from install import InstallError, install, main

    requirements, venvs = tmp_path / "requirements", tmp_path / "venvs"
    requirements.mkdir()
    (requirements / "lost.txt").write_text(f"--no-index\n{tmp_path / 'lost-1.0-py3-none-any.whl'}\n")
    with pytest.raises(InstallError, match=r"^lost: ERROR.*lost-1\.0"):
        install("lost", requirements=requirements, venvs=venvs)
    assert not (venvs / "lost" / ".installed").exists()
    with pytest.raises(InstallError, match=r"'other'.*lost"):
        install("other", requirements=requirements, venvs=venvs)
    assert main(["other"]) == 1
    assert "'other'" in capsys.readouterr().err


def test_every_peer_has_a_program_and_pinned_requirements() -> None:
    from install import REQUIREMENTS, peers

    assert peers() == ["genai", "hf_exporters", "llama_cpp", "openvino", "openvino_genai"]
    for name in peers():
        assert (PEERS / f"run_{name}.py").exists()
    for path in REQUIREMENTS.glob("*.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert lines and all("==" in line for line in lines), path.name
