"""Commands in processes with little memory, few files, or a limit of file sizes: the error says which."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
CLIP = ROOT / "assets" / "demo" / "clips" / "2-moving.mp4"
LIMITED = """
import resource, sys
from bridge_stg import cli
limit = getattr(resource, sys.argv[1])
resource.setrlimit(limit, (int(sys.argv[2]), int(sys.argv[2])))
sys.exit(cli.run(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("limit", "value", "codes"),
    [
        ("RLIMIT_AS", 500 * 2**20, {"host.out_of_memory", None}),
        pytest.param("RLIMIT_AS", 650 * 2**20, {"host.out_of_memory", None}, marks=pytest.mark.slow),
        pytest.param("RLIMIT_AS", 1200 * 2**20, {"host.out_of_memory", None}, marks=pytest.mark.slow),
        pytest.param("RLIMIT_AS", 1600 * 2**20, {"host.out_of_memory", None}, marks=pytest.mark.slow),
        ("RLIMIT_NOFILE", 3, {"host.too_many_files"}),  # standard streams only
        ("RLIMIT_FSIZE", 1000, {"output.not_writable"}),
    ],
)
def test_a_process_under_a_limit(
    limit: str, value: int, codes: set[str | None], demo_bundle: Path, tmp_path: Path
) -> None:
    assert resource.getrlimit(getattr(resource, limit))[1] in (resource.RLIM_INFINITY, -1) or limit == "RLIMIT_NOFILE"
    infer = ["infer", str(CLIP), "the white dog", "--bundle", str(demo_bundle), "--json", str(tmp_path / "r.json")]
    command = [sys.executable, "-c", LIMITED, limit, str(value), *infer]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode >= 0:
            break  # otherwise a library crashed because it got no memory, which is rare
    assert "Traceback" not in done.stderr, done.stderr
    code = None if done.returncode == 0 else done.stderr.strip().rpartition("[")[2].rstrip("]")
    assert code in codes, done.stderr
    assert done.returncode == 0 or not list(tmp_path.iterdir())
