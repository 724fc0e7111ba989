"""`evaluate` and `convert-refs`, from arguments to files, with fake models."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bridge_stg import cli
from bridge_stg.commands import evaluate as cli_evaluate
from bridge_stg.evaluation.run import evaluate as evaluate_module
from bridge_stg.evaluation.run.evaluate import Model
from tests.errors import raises
from tests.evaluation import official
from tests.evaluation.fake_models import Oracle


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two folders that look like bundles; their fake models know the truth."""
    from bridge_stg.evaluation.datasets.registry import read_dataset

    def fake(path: Path, label: str, **options: Any) -> Model:
        delay = 0.5 if path.parent.name == "two" else 0.0

        def open_model() -> Any:
            files = [json.loads(line) for line in (tmp_path / "read.json").read_text().splitlines()]
            dataset = read_dataset(files[0], [Path(p) for p in files[1]], Path(files[2]), split=files[3])
            return nullcontext(Oracle(dataset, delay=delay))

        return Model(label, {"fingerprint": str(path), **{k: str(v) for k, v in options.items() if v}}, open_model)

    monkeypatch.setattr(evaluate_module, "bundle_model", fake)
    paths = [tmp_path / "one/bundle", tmp_path / "two/bundle"]
    for path in paths:
        path.mkdir(parents=True)
        (path / "manifest.json").touch()
    return paths


def arguments(files: official.Files, models: list[Path], out: Path) -> list[str]:
    """Return the command for a fixture, and write what the fake models need to know beside `out`."""
    values = [files.name, [str(p) for p in files.annotations], str(files.media), files.split]
    (out.parent / "read.json").write_text("\n".join(map(json.dumps, values)))
    made = ["evaluate", files.name, "--media", str(files.media), "--out", str(out)]
    made += [part for path in files.annotations for part in ("--annotations", str(path))]
    made += [part for path in models for part in ("--model", str(path))]
    return made + (["--split", files.split] if files.split else [])


def test_evaluate(tmp_path: Path, bundles: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = official.charades_sta(tmp_path / "data")
    command = arguments(files, bundles, tmp_path / "out")
    assert cli.run([*command, "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert "one/bundle" in shown and "two/bundle" in shown and "R1@0.7" in shown and "report.html" in shown
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["figures"]["one/bundle"]["span"]["mIoU"] == 1
    assert 0 < report["figures"]["two/bundle"]["span"]["mIoU"] < 1
    assert cli.run(command) == 0
    assert "1 media were not found" in capsys.readouterr().out


def test_got10k_writes_the_servers_files(
    tmp_path: Path, bundles: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = official.got10k(tmp_path / "data")
    assert cli.run(arguments(files, bundles[:1], tmp_path / "out")) == 0
    assert "1 sequences" in capsys.readouterr().out
    name = "GOT-10k_Val_000001"
    assert (tmp_path / "out/got10k/bundle" / name / f"{name}_001.txt").is_file()


def test_convert_refs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = official.refs_pickle(tmp_path / "refs(unc).p", protocol=2)
    assert cli.run(["convert-refs", str(path), str(tmp_path / "refs.json")]) == 0
    assert "2 refs are in" in capsys.readouterr().out
    assert json.loads((tmp_path / "refs.json").read_text(encoding="utf-8")) == official.refs()


@pytest.mark.parametrize(
    ("changed", "code", "value"),
    [
        (["evaluate", "imagenet"], "options.invalid", "'vidstg'"),
        (["--shard", "3/2"], "options.invalid", "1 ≤ i ≤ n"),
        (["--shard", "0/2"], "options.invalid", "'0/2'"),
        (["--limit", "0"], "options.invalid", "--limit"),
        (["--split", "val"], "annotation.unknown_split", "'val'"),
        (["--media", "nowhere"], "annotation.no_media_folder", "nowhere"),
        (["--annotations", "nowhere"], "annotation.not_found", "nowhere"),
        (["--model", "nowhere"], "evaluation.no_model", "nowhere"),
        (["--model", "SAME"], "options.conflict", "--model"),
        (["--model", "EMPTY"], "evaluation.no_model", "manifest.json"),
        (["--workers", "2"], "options.conflict", "--executor ray"),
    ],
)
def test_faults_of_the_user(
    *,
    tmp_path: Path,
    bundles: list[Path],
    changed: list[str],
    code: str,
    value: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = official.charades_sta(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    command = arguments(files, bundles, tmp_path / "out")
    changed = [{"SAME": str(bundles[0]), "EMPTY": str(tmp_path / "empty")}.get(value, value) for value in changed]
    command = changed + command[2:] if changed[0] == "evaluate" else command + changed
    assert cli.run(command) == 2
    output = capsys.readouterr()
    assert output.err.endswith(f" [{code}]\n") and value in output.err
    assert output.out == "" and "Traceback" not in output.err
    assert not (tmp_path / "out").exists()


def test_a_broken_line_is_one_line_of_error(
    tmp_path: Path, bundles: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = official.charades_sta(tmp_path / "data")
    files.annotations[0].write_text("AO8RW 0 x##a\n")
    assert cli.run(arguments(files, bundles, tmp_path / "out")) == 2
    line = capsys.readouterr().err.rstrip("\n")
    assert line.startswith(f"Error: {files.annotations[0]}:1:") and "'x'" in line and "\n" not in line
    assert line.endswith(" [annotation.bad_line]")


def test_a_model_that_always_fails_is_an_error(
    tmp_path: Path, bundles: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = official.charades_sta(tmp_path / "data")
    monkeypatch.setattr(Oracle, "span", lambda *arguments, **options: 1 / 0)
    assert cli.run(arguments(files, bundles[:1], tmp_path / "out")) == 2
    shown = capsys.readouterr().err
    assert "[evaluation.all_failed]" in shown and "bundle" in shown and "ZeroDivisionError" in shown
    monkeypatch.undo()
    assert (tmp_path / "out/report.html").is_file()


def test_labels_are_unique(tmp_path: Path, bundles: list[Path]) -> None:
    other = tmp_path / "three/other"
    other.mkdir(parents=True)
    (other / "manifest.json").touch()
    options: dict[str, Any] = {"backend": "auto", "variant": None, "threads": None}
    assert [m.label for m in cli_evaluate.named_models([*bundles, other], **options)] == [
        "one/bundle", "two/bundle", "other"
    ]  # fmt: skip
    with raises("options.conflict", "--model"):
        cli_evaluate.named_models([bundles[0], bundles[0] / ".." / "bundle"], **options)


def test_a_checkpoint_is_identified_by_its_contents(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.json").write_text("{}")
    (first / "model.safetensors").write_bytes(b"weights")

    def digest(folder: Path) -> str:
        return cli_evaluate.contents_digest(sorted(folder.iterdir()), folder)

    second = Path(shutil.copytree(first, tmp_path / "second"))
    assert digest(first) == digest(second)
    (second / "model.safetensors").write_bytes(b"Weights")
    assert digest(first) != digest(second)


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_evaluate, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(cli_evaluate, "BLOCK_BYTES", 16)
    path = tmp_path / "model.safetensors"
    data = bytearray(range(256)) * 40
    path.write_bytes(data)
    before = cli_evaluate.contents_digest([path], tmp_path)
    for place in (0, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 255
        path.write_bytes(changed)
        assert cli_evaluate.contents_digest([path], tmp_path) != before
