"""How many processors this process may use: its affinity and its container's quota, which engines do not ask about."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")
MAX_THREADS = 256
"""Of one engine, which takes any number: with thousands, it takes minutes to start them."""


def usable_cpus() -> int:
    """Return how many logical processors may run this process's threads at once, at least 1."""
    quota = quota_cpus(CGROUPS, OWN_CGROUP)
    allowed = len(_affinity())
    return allowed if quota is None else max(1, min(allowed, quota))


@cache
def limited_threads() -> int | None:
    """Return how many threads an engine should compute with, where it would take more than it may; None: it may choose.

    An engine counts the physical cores of the whole machine. Where the affinity (`taskset`, a cpuset) or the quota of a
    container (`docker run --cpus`) leaves fewer, its threads would wait for each other: one a physical core that the
    process may use, and no more than the quota, is what is left.
    """
    quota, allowed = quota_cpus(CGROUPS, OWN_CGROUP), _affinity()
    cores = physical_cores(TOPOLOGY, allowed)
    if quota is not None and quota < cores:
        return quota
    return cores if len(allowed) < (os.cpu_count() or 1) else None


def physical_cores(topology: Path, cpus: frozenset[int]) -> int:
    """Return on how many physical cores these logical processors lie: two of one core share its arithmetic units."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii"))
        except OSError:  # not told here: each counts
            cores.add(str(cpu))
    return max(1, len(cores))


def quota_cpus(cgroups: Path, own: Path) -> int | None:
    """Return the processors' worth of time that the process's control groups leave it, rounded up; None: no limit.

    Args:
        cgroups: where control groups are mounted, of version 2 (`cpu.max`) or 1 (`cpu/cpu.cfs_quota_us`).
        own: the file that names the process's own.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        root = cgroups if number == "0" else cgroups / "cpu"
        folder = root / path.strip("/")
        # A container sees its own group as the root, or the host's path that is not there.
        for place in (folder, *folder.parents):
            limit = _limit(place)
            if limit is not None:
                limits.append(limit)
            if place == root:
                break
    return max(1, math.ceil(min(limits) - 1e-6)) if limits else None


def _limit(folder: Path) -> float | None:
    """Return the processors' worth of one control group, None where it sets no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:  # "max", or -1
        return None
    return int(quota) / int(period)


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
