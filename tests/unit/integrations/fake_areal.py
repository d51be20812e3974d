"""AReaLs for tests of the integration: packages in a folder that have what it looks at, and no more.

Each controller launches a router and a data proxy as its generation does, through the seams that it has; what
a guard would be sent is kept in `launched`.
"""

from __future__ import annotations

from pathlib import Path

SYNC = "def _fork_on_guard(self, guard_addr, role, worker_index, raw_cmd, health_path='/health'):"
ASYNC = (
    "async def _async_fork_on_guard(self, guard_addr, role, worker_index, raw_cmd, health_path='/health'):"
)
KEPT = """
        self.launched.append((role, list(raw_cmd) + ['--host', '10.0.0.1', '--port', '7001']))
        return '10.0.0.1', 7001
"""

CONTROLLER = """
import asyncio, sys

class RolloutControllerV2:
    def __init__(self):
        self.launched = []
    {methods}
    def initialize(self):
        for role, module in (('router', '{package}.router'), ('data-proxy', '{proxy}')):
            argv = [sys.executable, '-m', module, '--tokenizer-path', '/t', '--admin-api-key', 'k']
            given = dict(guard_addr='http://g', role=role, worker_index=0, raw_cmd=argv)
            {call}
        return self.launched
"""
WORKFLOW = """
class InferenceServiceWorkflow:
    async def _export_interactions(self, session, data):
        return data[{member!r}]
"""


def write(
    root: Path,
    *,
    package: str,
    seams: tuple[str, ...],
    member: str = "traj",
    proxy: str = "",
    owner: str = "",
) -> None:
    """An `areal` below `root`, with its controller in `package`. `seams`: the heads of its methods, the one
    that launches first. `owner`: the class under another name."""
    here = root
    for part in package.split("."):
        here = here / part
        here.mkdir(exist_ok=True)
        (here / "__init__.py").touch()
    folder = here / "controller"
    folder.mkdir()
    # as the released one: the package imports its controller first, its workflow after it
    (folder / "__init__.py").write_text("from . import controller, workflow\n")
    launches = seams[0].split("(")[0].split()[-1]
    code = CONTROLLER.format(
        package=package,
        proxy=proxy or f"{package}.data_proxy",
        methods="\n    ".join(seam + KEPT for seam in seams),
        call=f"asyncio.run(self.{launches}(**given))"
        if seams[0].startswith("async")
        else f"self.{launches}(**given)",
    )
    (folder / "controller.py").write_text(code.replace("RolloutControllerV2", owner or "RolloutControllerV2"))
    (folder / "workflow.py").write_text(WORKFLOW.format(member=member))


EXPERIMENTAL, V2 = "areal.experimental.inference_service", "areal.v2.inference_service"
GENERATIONS = {
    "1.0": {"package": EXPERIMENTAL, "seams": (ASYNC, SYNC), "member": "traj"},
    "main-may": {"package": EXPERIMENTAL, "seams": (ASYNC, SYNC), "member": "interactions"},
    "pr1268": {"package": EXPERIMENTAL, "seams": (SYNC,), "member": "interactions"},
    "v2": {"package": V2, "seams": (ASYNC, SYNC), "member": "traj"},
}
"""What `write` takes for each known one, by the dialect that its proxy must speak."""
