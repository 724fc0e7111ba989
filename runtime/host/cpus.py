"""Count the processors that this process may use, by its affinity and its container's quota, which engines ignore."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")
MAX_THREADS = 256
"""Most threads of one session: starting thousands would take minutes."""


def usable_cpus() -> int:
    """Return how many logical processors can run this process's threads in parallel, at least 1."""
    quota = quota_cpus(CGROUPS, OWN_CGROUP)
    allowed = len(_affinity())
    return allowed if quota is None else max(1, min(allowed, quota))


@cache
def limited_threads() -> int | None:
    """Return the threads for an engine if this process may use only a part of the machine; None: the engine's default.

    Engines count the physical cores of the whole machine. If the affinity (`taskset`, a cpuset) or the quota of a
    container (`docker run --cpus`) leaves fewer, their threads would wait for each other.
    """
    quota, allowed = quota_cpus(CGROUPS, OWN_CGROUP), _affinity()
    cores = physical_cores(TOPOLOGY, allowed)
    if quota is not None and quota < cores:
        return quota
    return cores if len(allowed) < (os.cpu_count() or 1) else None


def physical_cores(topology: Path, cpus: frozenset[int]) -> int:
    """Return the number of physical cores of these logical processors."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii"))
        except OSError:  # unknown: count each
            cores.add(str(cpu))
    return max(1, len(cores))


def quota_cpus(cgroups: Path, own: Path) -> int | None:
    """Return the CPU quota of the process's control groups in processors, rounded up; None: no limit.

    Args:
        cgroups: mount point of control groups, version 2 (`cpu.max`) or 1 (`cpu/cpu.cfs_quota_us`).
        own: file that names the process's control groups.
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
        # A container sees its group as the root, or the host's path, which does not exist there.
        for place in (folder, *folder.parents):
            if (limit := _limit(place)) is not None:
                limits.append(limit)
            if place == root:
                break
    return max(1, math.ceil(min(limits) - 1e-6)) if limits else None


def _limit(folder: Path) -> float | None:
    """Return the quota of one control group in processors; None: no limit."""
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
