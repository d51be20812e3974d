"""Imports look down only, and no process of the service ever loads torch or transformers.

The table is the whole rule: a package may import itself and what its row names, lazily or not. An import that
the table forbids is a change of architecture, to be argued there first.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "areal_fast"

BELOW = {
    "errors": set(),
    "config": {"errors"},
    "core": {"errors"},
    "protocol": {"errors", "config"},
    "http": {"protocol", "errors", "config"},
    "shards": {"core", "protocol", "errors", "config"},
    "store": {"core", "protocol", "shards", "errors", "config"},
    "engine": {"core", "http", "protocol", "errors", "config"},
    "embedded": {"http", "engine", "protocol", "errors", "config"},
    "service": {"engine", "store", "shards", "http", "embedded", "core", "protocol", "errors", "config"},
    "client": {"shards", "http", "protocol", "errors"},
    "integrations": {"client", "shards", "http", "protocol", "errors", "config"},
    "demo": {"client", "embedded", "config", "errors"},
    "dumps": {"engine", "protocol", "errors", "config"},
    "top": {"errors", "config"},
    "cli": {"service", "demo", "dumps", "top", "embedded", "store", "http", "protocol", "config", "errors"},
    "__main__": {"cli"},
    "__init__": set(),
}

# What reaches up, each with its reason. Only inside a function, never at import.
LAZY_UP = {
    # `builtin:bytes` is one of the tokenizers that load_tokenizer can be asked for; its code ships with the
    # embedded engine, which it is made for.
    ("areal_fast/engine/tokenizer.py", "areal_fast.embedded.tokenizer"),
}

# torch: in the client, where a tensor is made or only named, in the edge of a GPU client, and in the demo,
# which uses the client. transformers: in the helper for folders with code of their own.
HEAVY = {
    "torch": {
        *(f"areal_fast/client/{name}.py" for name in ("tensors", "shards", "references", "gpu")),
        "areal_fast/demo/tensors.py",
        "areal_fast/integrations/rtensor.py",
        "areal_fast/shards/gpu_torch.py",
    },
    "transformers": {"areal_fast/engine/tokenizer_helper.py"},
}


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, at the top level) of every import statement, relative ones made absolute."""
    tree = ast.parse(path.read_text(), str(path))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(x for x in (base, node.module) if x)
            if module == "areal_fast":
                for name in node.names:
                    yield f"areal_fast.{name.name}", node.lineno, id(node) not in lazy
            else:
                yield module, node.lineno, id(node) not in lazy


def forbidden(path: Path) -> list[str]:
    """The imports of one file that its layer may not have, as lines of text."""
    here = layer(module_of(path))
    where = path.relative_to(ROOT).as_posix()
    found = []
    for module, line, at_top in imports(path):
        if module.split(".")[0] != "areal_fast":
            continue
        there = layer(module)
        if there in (here, "__version__", "__init__") or there in BELOW[here]:
            continue
        if (where, module) in LAZY_UP and not at_top:
            continue
        found.append(f"{where}:{line}: {here} may not import {module}")
    return found


def test_every_package_has_a_place() -> None:
    found = {layer(module_of(p)) for p in sources()}
    assert found <= set(BELOW), f"no layer is named for {found - set(BELOW)}"


def test_imports_look_down() -> None:
    assert [line for path in sources() for line in forbidden(path)] == []


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(BELOW):
        free = {name for name, below in BELOW.items() if name not in done and below <= done}
        assert free, f"a cycle among {set(BELOW) - done}"
        done |= free


def test_a_forbidden_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "areal_fast" / "protocol" / "bad.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "def f():\n    from ..store import x\nimport areal_fast.http.server\nfrom areal_fast import errors\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [line.split(" may ")[0] for line in forbidden(file)] == [
        "areal_fast/protocol/bad.py:3: protocol",
        "areal_fast/protocol/bad.py:2: protocol",
    ]


def test_exceptions_are_used() -> None:
    used = {(p.relative_to(ROOT).as_posix(), m) for p in sources() for m, _, _ in imports(p)}
    assert used >= LAZY_UP, "an exception that nothing needs any more"


@pytest.mark.parametrize("heavy", sorted(HEAVY))
def test_heavy_packages_stay_out(heavy: str) -> None:
    found = {
        p.relative_to(ROOT).as_posix()
        for p in sources()
        for module, _, _ in imports(p)
        if module.split(".")[0] == heavy
    }
    assert found <= HEAVY[heavy]


@pytest.mark.parametrize(
    "module",
    [
        "service.supervisor",
        "service.worker",
        "service.cleaner",
        "service.keeper",
        "client",
        "integrations.ray",
    ],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    """A worker never has torch; a client has it when it makes a tensor, openai when it makes a chat, and Ray
    when it is asked to use it."""
    program = (
        f"import sys, areal_fast.{module}\n"
        "heavy = {'torch', 'transformers', 'openai', 'ray'}\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules} & heavy))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=200, check=True
    )
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("process", ["supervisor", "worker", "cleaner"])
def test_only_the_keeper_has_the_cuda_edge(process: str) -> None:
    program = f"import sys, areal_fast.service.{process}\nprint('areal_fast.core._cuda' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert run.stdout.strip() == "False"
