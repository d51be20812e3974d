"""AREAL_FAST=1: what areal_fast.pth starts in every interpreter that has the variable set.

Nothing is done but waiting: when a program imports AReaL, its rollout controllers are made to launch
areal_fast (areal.enable), and its RTensor to fetch over the cheap ways (rtensor.enable_rtensor), in every
process that uses them. Programs that never import AReaL only paid for this module.

What cannot be done is one line on stderr, and the variable is set to 0 for this process and those it starts,
so that it is said once and not by every worker.

Cost: areal_fast.pth is one line, which Python's site module runs at every start (in a virtual environment
twice, so `install` is idempotent). A start of Python 3.11 there takes 15.0 ms of CPU without the file, 15.4
with it and the variable unset, 16.9 with the variable set (10th percentiles of 250 starts each, taken in
turns, on a busy 2-core AMD EPYC).

Must not: import anything but imports.py before AReaL is; raise.
"""

from __future__ import annotations

from areal_fast.integrations.imports import AfterImport, complain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

AREAL = "areal"
RTENSOR = "areal.infra.rpc.rtensor"
_after = AfterImport()


def install() -> None:
    """Wait for AReaL."""
    _after.wanted[AREAL] = _areal
    _after.wanted[RTENSOR] = _rtensor
    _after.install()


def _areal(_module: ModuleType) -> None:
    if not _on():
        return
    from areal_fast import config
    from areal_fast.integrations import areal

    try:
        known = areal.enable()
    except config.UsageError as error:
        complain(f"error: {error}; AReaL keeps its own data proxy")
        known = False
    if not known:
        config.switch_areal_off()


def _rtensor(_module: ModuleType) -> None:
    if not _on():
        return
    from areal_fast.integrations.rtensor import enable_rtensor

    enable_rtensor()


def _on() -> bool:
    from areal_fast import config

    try:
        return config.areal_switch()
    except config.UsageError as error:
        complain(f"error: {error}; AReaL is left as it is")
        config.switch_areal_off()
        return False
