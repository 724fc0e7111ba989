"""How many processors a process may use: affinity, cores that share units, quotas of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge_stg.runtime.host import cpus
from bridge_stg.runtime.host.cpus import limited_threads, physical_cores, quota_cpus, usable_cpus

QUOTA, PERIOD = "cpu_dot_cfs_quota_us", "cpu_dot_cfs_period_us"


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu_dot_max": "max 100000\n"}, None),
        ("0::/\n", {"cpu_dot_max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu_dot_max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a__b__cpu_dot_max": "max 100000", "a__cpu_dot_max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a__b__cpu_dot_max": "400000 100000", "a__cpu_dot_max": "300000 100000"}, 3),
        ("0::/host/path\n", {"cpu_dot_max": "200000 100000"}, 2),  # a container sees its own group as the root
        (
            "4:cpu,cpuacct:/x\n",
            {"cpu__x__cpu_dot_cfs_quota_us": "250000", "cpu__x__cpu_dot_cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu,cpuacct:/x\n", {"cpu__cpu_dot_cfs_quota_us": "-1", "cpu__cpu_dot_cfs_period_us": "100000"}, None),
        ("3:memory:/x\n", {"cpu_dot_max": "100000 100000"}, None),
        ("0::/\n", {"cpu_dot_max": "nonsense"}, None),
    ],
)
def test_quotas_of_both_versions(tmp_path: Path, own: str, files: dict[str, str], expected: int | None) -> None:
    root = write(tmp_path / "cgroup", **files)
    write(tmp_path, own=own)
    assert quota_cpus(root, tmp_path / "own") == expected
    assert quota_cpus(root, tmp_path / "missing") is None


def test_two_processors_of_a_core_count_once(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path, **{f"cpu{cpu}__topology__thread_siblings_list": siblings})
    assert physical_cores(tmp_path, frozenset({0, 1, 2, 3})) == 2
    assert physical_cores(tmp_path, frozenset({0, 2})) == 1
    assert physical_cores(tmp_path / "missing", frozenset({0, 2})) == 2


@pytest.mark.parametrize(
    ("allowed", "quota", "threads", "usable"),
    [
        ({0, 1, 2, 3}, None, None, 4),  # nothing is withheld: the engine chooses
        ({0, 1, 2, 3}, 1, 1, 1),
        ({0, 1, 2, 3}, 3, None, 3),  # 2 physical cores fit into it
        ({0, 2}, None, 1, 2),
        ({1}, 4, 1, 1),
    ],
)
def test_threads_are_limited_where_the_process_may_use_less_than_the_machine_has(
    *,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allowed: set[int],
    quota: int | None,
    threads: int | None,
    usable: int,
) -> None:
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path, **{f"cpu{cpu}__topology__thread_siblings_list": siblings})
    write(tmp_path, own="0::/\n", cpu_dot_max="max 100000" if quota is None else f"{quota * 1000} 1000")
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpus, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(cpus, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(cpus, "_affinity", lambda: frozenset(allowed))
    monkeypatch.setattr(cpus.os, "cpu_count", lambda: 4)
    limited_threads.cache_clear()
    try:
        assert (limited_threads(), usable_cpus()) == (threads, usable)
    finally:
        limited_threads.cache_clear()
