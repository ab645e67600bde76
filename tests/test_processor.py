"""How many cores a process may keep busy: affinity and the quotas of its control groups."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bitdial import processor

V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"

# name -> (/proc/self/cgroup, /proc/self/mountinfo, other files, cores' worth)
GROUPS: dict[str, tuple[str, str, dict[str, str], float | None]] = {
    "v2": ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
    "v2, no limit": ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "v2, the least of the group and those around it": (
        "0::/pods/pod a/box\n",
        V2,
        {
            "sys/fs/cgroup/pods/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/pods/pod a/cpu.max": "150000 50000\n",
            "sys/fs/cgroup/pods/pod a/box/cpu.max": "max 100000\n",
        },
        3.0,
    ),
    "v2, a container that is called by its path on the host": (
        "0::/../../docker/abc\n", V2, {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5
    ),
    "v1": (
        "4:memory:/other\n3:cpu,cpuacct:/jobs/7\n",
        V1.format(top="/"),
        {
            "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_quota_us": "500000\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        5.0,
    ),
    "v1, a container whose group is the top of the mount": (
        "3:cpu,cpuacct:/docker/abc\n",
        V1.format(top="/docker/abc"),
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "v1 for the CPU beside v2": (
        "1:cpu,cpuacct:/\n0::/\n",
        V1.format(top="/") + V2.replace("/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw"),
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        1.0,
    ),
    "nonsense": ("what\n0::\n", "a b - c\n" + V2, {"sys/fs/cgroup/cpu.max": "two cores\n"}, None),
    "no control groups": ("", "", {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", list(GROUPS))
def test_quota_of_the_control_groups(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    groups, mounts, files, expected = GROUPS[name]
    for path, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(processor, "SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert processor.cpu_quota() == expected
    assert processor.usable_cores() == (4 if expected is None else max(1, min(4, int(expected))))


def test_memory_limit_of_the_group_that_the_process_is_in(tmp_path: Path, monkeypatch: Any) -> None:
    for path, text in {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/box/memory.max": "1073741824\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(processor, "SYSTEM", tmp_path)
    assert processor.memory_limit() == 1 << 30
