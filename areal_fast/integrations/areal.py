"""Makes an installed AReaL's rollout controller launch areal_fast where it would launch its data proxy.

    AREAL_FAST=1 python train.py …                       # nothing to change in the code

    from areal_fast.integrations import areal            # or: in the process of the controller, before
    areal.enable(workers=4, stale_session_dump_path="/data/stale")   # it initializes

Seam. Every generation's controller builds the argv of a service, adds --host and --port in one method and
has a guard run it (`POST /fork`). That method is wrapped: where the argv runs the data proxy's module, it
runs `areal_fast` instead, with the same flags and ours behind them. All else is AReaL's own: guard,
scheduler, ports, health wait, teardown. Nothing is imported that the user does not import: what is not loaded
yet is patched when it is (imports.py). LAYOUTS says where the generations have what; a controller that
does not fit is left alone, and one line on stderr says so.

Options are the proxy's own (`areal-fast serve --help`), from two places: AREAL_FAST_ARGS, split like a shell
command, and enable()'s keywords, which win. Both win over what AReaL passes. They travel in the argv,
because the guard may be on another host. Both are checked here, so that a wrong one is named at once and not
by a proxy that does not come up. What AReaL alone can know (address, engine, key, call-back) is refused. Two
are given unasked: --drain-seconds, because a guard kills the tree 3 s after its SIGTERM and dumps want time,
and --areal-dialect, from what the installed AReaL reads.

Must not: import areal or torch; edit AReaL's files; raise out of an import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

from areal_fast.integrations.imports import AfterImport, complain

OWNER: Final = "RolloutControllerV2"
SYNC: Final = "_fork_on_guard"
ASYNC: Final = "_async_fork_on_guard"
ROLE: Final = "data-proxy"
PARAMETERS: Final = ("guard_addr", "role", "worker_index", "raw_cmd")
"""What a seam must take, in this order, after self. It may take more."""
DRAIN_S: Final = 0.5
"""A guard waits 3 s between SIGTERM and SIGKILL; what is left of them is for dumps."""
MODULE: Final = "areal_fast"


class Layout(NamedTuple):
    """Where a generation of AReaL (WIRE: "The wire") has what."""

    generation: str
    package: str
    """Holds controller.controller with the class OWNER, controller.workflow, and the module data_proxy."""
    seams: tuple[str, ...]
    """OWNER's methods that launch. The first must be there, and be the first of ASYNC, SYNC that is; the
    others are wrapped if they are there."""
    exports: Mapping[str, str]
    """Which dialect the proxy is to speak, by the member of an export's answer that the workflow reads. One
    for every answer: by ""."""

    @property
    def controller(self) -> str:
        return f"{self.package}.controller.controller"

    @property
    def proxy(self) -> str:
        return f"{self.package}.data_proxy"


LAYOUTS: Final = (
    Layout("v2", "areal.v2.inference_service", (ASYNC, SYNC), {"": "v2"}),
    Layout(
        "1.0",
        "areal.experimental.inference_service",
        (ASYNC, SYNC),
        {"traj": "1.0", "interactions": "main-may"},
    ),
    Layout("pr1268", "areal.experimental.inference_service", (SYNC,), {"interactions": "pr1268"}),
)

_lock = threading.RLock()
_after = AfterImport()
_arguments: list[str] | None = None
"""Ours, put behind AReaL's flags. None: disabled, and every wrapper that somebody kept lets all pass."""
_wrapped: list[tuple[type, str, Any, Any]] = []
"""(class, method's name, the original, ours) of what was replaced."""
_said: set[str] = set()


def enable(**options: str | float | bool | None) -> bool:
    """Launch areal_fast in place of AReaL's data proxy from now on, in this process. Idempotent: a second
    call replaces the options.

    options: the proxy's flags with underscores, `workers=4` for `--workers 4`, `data_auth=True` for
    `--data-auth`; None and False are left out. They win over AREAL_FAST_ARGS. Raises config.UsageError,
    which names what is wrong, and changes nothing then.
    Returns whether an AReaL is installed that is known. If not, one line on stderr says why, and AReaL stays
    as it is.
    """
    from areal_fast import config

    global _arguments
    arguments = config.areal_arguments(options)
    with _lock:
        why = _why_unknown()
        if why:
            _say(f"warning: {why}; AReaL keeps its own data proxy")
            return False
        _arguments = arguments
        for layout in LAYOUTS:
            _after.wanted[layout.controller] = _patch
        _after.install()
        loaded = [sys.modules[name] for name in _after.wanted if name in sys.modules]
        fit = [_patch(module) for module in loaded]
        return all(fit)


def disable() -> None:
    """Undo enable(), and AREAL_FAST=1 for this process and those it starts: what is launched from now on is
    AReaL's own. What runs is left running. Idempotent."""
    from areal_fast import config

    global _arguments
    config.switch_areal_off()
    with _lock:
        _arguments = None
        _after.remove()
        for owner, name, original, ours in _wrapped:
            if vars(owner).get(name) is ours:  # else somebody wrapped ours, which now lets all pass
                setattr(owner, name, original)
        _wrapped.clear()
        _said.clear()


def _why_unknown() -> str:
    """Why there is no AReaL here that may have one of the layouts, "" if there is. Imports nothing."""
    try:
        found = importlib.util.find_spec("areal")
    except (ImportError, ValueError):
        found = None
    folders = [Path(folder) for folder in (found and found.submodule_search_locations) or ()]
    if not folders:
        return "AReaL is not installed here"
    for layout in LAYOUTS:
        file = Path(*layout.controller.split(".")[1:]).with_suffix(".py")
        if any((folder / file).is_file() for folder in folders):
            return ""
    return f"the AReaL in {folders[0]} has no rollout controller where areal_fast knows one"


def _patch(module: ModuleType) -> bool:
    """Wrap the seams of a controller's module. Whether it fits a layout; else says why not."""
    owner = getattr(module, OWNER, None)
    with _lock:
        if any(owner is wrapped for wrapped, *_ in _wrapped):
            return True
        found = _fitting(owner, module.__name__)
        if isinstance(found, str):
            _say(f"warning: {module.__name__} is of no AReaL that areal_fast knows: {found}; left as it is")
            return False
        for name in found.seams:
            original = vars(owner).get(name)
            if original is not None:
                ours = _launching(original, found)
                setattr(owner, name, ours)
                _wrapped.append((owner, name, original, ours))  # type: ignore[arg-type]
        return True


def _fitting(owner: Any, controller: str) -> Layout | str:
    """The layout of a controller's class, or why it is none that is known."""
    if not isinstance(owner, type):
        return f"no class {OWNER}"
    present = [name for name in (ASYNC, SYNC) if name in vars(owner)]
    if not present:
        return f"{OWNER} has neither {ASYNC} nor {SYNC}"
    for name in present:
        method = vars(owner)[name]
        if not inspect.isfunction(method) or inspect.iscoroutinefunction(method) != (name == ASYNC):
            return f"{OWNER}.{name} is no {'coroutine function' if name == ASYNC else 'plain function'}"
        takes = tuple(inspect.signature(method).parameters)
        if takes[1 : 1 + len(PARAMETERS)] != PARAMETERS:
            return f"{OWNER}.{name} takes ({', '.join(takes)})"
    for layout in LAYOUTS:
        if layout.controller == controller and layout.seams[0] == present[0]:
            return layout
    return f"{OWNER} launches by {present[0]}"


def _launching(original: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """The seam around `original`: the same call with another argv."""
    signature = inspect.signature(original)

    def changed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["raw_cmd"] = _command(layout, bound.arguments["role"], bound.arguments["raw_cmd"])
        return bound

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def launch_later(*args: Any, **kwargs: Any) -> Any:
            bound = changed(args, kwargs)
            return await original(*bound.args, **bound.kwargs)

        return launch_later

    @functools.wraps(original)
    def launch(*args: Any, **kwargs: Any) -> Any:
        bound = changed(args, kwargs)
        return original(*bound.args, **bound.kwargs)

    return launch


def _command(layout: Layout, role: str, argv: Sequence[str]) -> Sequence[str]:
    """The argv to launch instead: the same object where it runs anything but the data proxy."""
    if _arguments is None:
        return argv
    at = argv.index("-m") + 1 if "-m" in argv else len(argv)
    if list(argv[at : at + 1]) != [layout.proxy]:
        if role == ROLE:
            _say(f"warning: AReaL's data proxy is {list(argv)[:3]}, not {layout.proxy}; AReaL keeps it")
        return argv
    dialect = _dialect(layout)
    ours = ["--drain-seconds", str(DRAIN_S), "--areal-dialect", dialect, *_arguments]
    generation = layout.generation if dialect == "auto" else dialect
    _say(f"AReaL {generation}: its data proxies are launched as {MODULE}, with {' '.join(ours)}")
    return [*argv[:at], MODULE, *argv[at + 1 :], *ours]


def _dialect(layout: Layout) -> str:
    """What --areal-dialect the installed AReaL reads: "auto" if its workflow does not tell."""
    if "" in layout.exports:
        return layout.exports[""]
    try:
        workflow = importlib.import_module(f"{layout.package}.controller.workflow")
        code = inspect.unwrap(workflow.InferenceServiceWorkflow._export_interactions).__code__
    except (ImportError, AttributeError):
        return "auto"
    return next((dialect for member, dialect in layout.exports.items() if member in code.co_consts), "auto")


def _say(text: str) -> None:
    """A line on stderr, once."""
    if text not in _said:
        _said.add(text)
        complain(text)
