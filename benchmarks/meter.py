"""What a process tree has used: CPU time and memory, from /proc and the kernel's clocks.

CPU is that of all its processes: every one's CPU clock, in nanoseconds (the kernel's own, ended threads
included), and the ticks of reaped children. Memory is proportional: what processes share counts once.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> tuple[int, int] | None:
    """(parent, ticks of reaped children), or None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), int(fields[13]) + int(fields[14])


def tree(root: int) -> set[int]:
    """The process and all its living descendants."""
    parents = {
        int(name): found[0] for name in os.listdir("/proc") if name.isdigit() and (found := _stat(int(name)))
    }
    members = {root}
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    return members


def tree_cpu_s(root: int) -> float:
    """CPU seconds that the process tree has used so far, user and system."""
    return sum(process_cpu_s(pid) + found[1] / TICKS_PER_S for pid in tree(root) if (found := _stat(pid)))


def process_cpu_s(pid: int) -> float:
    """The process's own CPU time, by its clock (clock_getcpuclockid(3); 2 is CPUCLOCK_SCHED)."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def tree_rss_bytes(root: int) -> int:
    """Proportional resident memory (PSS) of the tree, so that what processes share counts once."""
    total = 0
    for pid in tree(root):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total
