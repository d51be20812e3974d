"""Call-backs after the import of a module, by a finder in front of `sys.meta_path`.

Theory. The finder finds nothing itself: it asks the finders behind it, and gives the loader of a module that
is waited for an `exec_module` of its own, which runs the module, forgets itself and calls back. So a module
is never imported earlier than its user does it, and a module that nobody waits for costs one look into a
dict. A reload is an import.

Must not: import anything heavy (it is loaded at the start of every interpreter with AREAL_FAST set), and let
a call-back's failure reach the import: `complain` says it in one line.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own costs as much as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    CallBack = Callable[[ModuleType], object]


def complain(text: str) -> None:
    """One line on stderr, with our name. Not by logging: AReaL's set-up of it switches existing loggers
    off."""
    try:
        print(f"areal_fast: {' '.join(text.split())}", file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):  # a closed stderr, or none
        pass


class AfterImport:
    """The finder. `wanted`: who is called after the import of a module, by the module's name. For one thread
    at a time but for `find_spec`, which may come from any."""

    def __init__(self) -> None:
        self.wanted: dict[str, CallBack] = {}

    def install(self) -> None:
        """Be in front, once."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Nothing is waited for any more."""
        self.wanted.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """importlib's protocol: the spec that the others find, its loader calling back."""
        if name not in self.wanted:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._call_back(spec)
                return spec
        return None

    def _call_back(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        run = getattr(loader, "exec_module", None)
        if loader is None or run is None:
            return

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            run(module)
            wanted = self.wanted.get(module.__name__)
            if wanted is None:
                return
            try:
                wanted(module)
            except Exception as failure:  # it is the user's import: nothing of ours may end it
                complain(f"error: {module.__name__} is left as it is: {type(failure).__name__}: {failure}")

        try:
            loader.exec_module = exec_module  # type: ignore[method-assign]
        except AttributeError:  # a loader that lets nothing be set: no loader of files
            complain(f"error: {spec.name} is left as it is: {type(loader).__name__} cannot be followed")
