"""`areal-fast dumps` on what the cleaner really writes, and on what it never would."""

from __future__ import annotations

import base64
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from areal_fast.dumps import main, reading
from areal_fast.protocol.names import dump_name
from areal_fast.store import SessionStore
from tests.model_arena import ModelArena

PROMPT, ANSWER = "What?\nNow\x1b[31m", "Forty-two"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of two sessions, as the cleaner wrote them: one of them ready, one active and string-only."""
    folder = tmp_path_factory.mktemp("dumps")
    arena = ModelArena.create(64 << 20)
    arena.proc_enter(1)
    store = SessionStore(arena)
    for task in ("a/ä", "math"):
        key = store.start(task).sessions[0][1]
        session = store.by_key(key)
        assert session is not None
        with session:
            for _ in range(2):
                turn = session.begin_turn(reserve_tokens=64)
                turn.commit(
                    prompt_ids=list(PROMPT.encode()),
                    output_ids=list(ANSWER.encode()),
                    logprobs=[-0.5] * len(ANSWER),
                    version_runs=[(3, 4), (4, len(ANSWER) - 4)],
                    stop_reason="stop",
                )
            session.set_reward(0.25)
            session.begin_turn(reserve_tokens=64).commit_string(b'[{"role": "user", "content": "hi"}]', "ho")
    assert len(store.cleanup_stale(0.0, str(folder)).files) == 4
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.fixture
def folder(tmp_path: Path, written: dict[str, bytes]) -> Path:
    made = tmp_path / "dumps"
    made.mkdir()
    for name, data in written.items():
        (made / name).write_bytes(data)
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


Run = Callable[..., tuple[int, str, str]]
GOOD = "math-0-trajectory-0.json"


def change(folder: Path, edit: Callable[[Any], object], name: str = GOOD) -> None:
    value = json.loads((folder / name).read_text())
    edit(value)
    (folder / name).write_text(json.dumps(value))


def first(value: dict[str, Any]) -> Any:
    return next(iter(value.values()))


def array(values: Any, dtype: str = "int64", shape: Any = None) -> dict[str, Any]:
    made = np.asarray(values, {"int64": "<i8", "float32": "<f4", "bool": "?"}[dtype])
    data = base64.b64encode(made.tobytes()).decode()
    return {"type": "tensor", "data": data, "shape": shape or [1, made.size], "dtype": f"torch.{dtype}"}


# -- what was written --------------------------------------------------------------------------------------
def test_list(folder: Path, run: Run) -> None:
    status, out, err = run("list", folder)
    rows = [line.split() for line in out.splitlines()]
    n = len(PROMPT) + len(ANSWER)
    assert (status, err) == (0, "")
    assert [row[:6] for row in rows[1:-1]] == [
        ["a/ä-0", "active", "1", "0", "0", "0"],
        ["a/ä-0", "0", "2", str(2 * n), str(2 * len(ANSWER)), "0.25"],
        ["math-0", "active", "1", "0", "0", "0"],
        ["math-0", "0", "2", str(2 * n), str(2 * len(ANSWER)), "0.25"],
    ]
    assert rows[-1][:4] == ["4", "files,", "6", "interactions,"]


def test_show_decodes_and_escapes(folder: Path, run: Run) -> None:
    status, out, _ = run("show", folder, "--session", "math-0", "--tokenizer-path", "builtin:bytes")
    assert status == 0
    assert out.count("prompt:    What?\n") == 2 and out.count("output:    Forty-two\n") == 2
    assert "Now\\x1b[31m" in out and "\x1b" not in out
    assert "versions 3 (4), 4 (5)" in out and "mean logprob -0.5000" in out
    assert "user:      hi\n" in out and "assistant: ho\n" in out


def test_show_without_a_tokenizer_has_no_text(folder: Path, run: Run) -> None:
    status, out, _ = run("show", folder / GOOD)
    assert status == 0 and "15 prompt + 9 output tokens".replace("15", str(len(PROMPT))) in out
    assert "Forty" not in out


def test_show_cuts_long_texts(folder: Path, run: Run) -> None:
    def long(value: Any) -> None:
        ids = list(b"x" * 5000)
        for name, made in (
            ("input_ids", array(ids)),
            ("loss_mask", array([0] * 5000)),
            ("versions", array([-1] * 5000)),
            ("logprobs", array([0] * 5000, "float32")),
        ):
            first(value)["tensor_dict"][name] = made

    change(folder, long)
    _, out, _ = run("show", folder / GOOD, "--tokenizer-path", "builtin:bytes")
    assert "… 3000 characters more (--full)" in out
    _, out, _ = run("show", folder / GOOD, "--tokenizer-path", "builtin:bytes", "--full")
    assert "x" * 5000 in out


def test_a_good_folder_verifies(folder: Path, run: Run) -> None:
    assert run("verify", folder) == (0, "4 of 4 files are as they were written\n", "")


def test_select(folder: Path, run: Run) -> None:
    assert run("verify", folder, "--session", "a/ä-0")[1].startswith("2 of 2")
    assert run("verify", folder, "--session", "a/ä-0", "--trajectory", "active")[1].startswith("1 of 1")
    assert run("verify", folder, "--trajectory", "0")[1].startswith("2 of 2")
    status, _, err = run("verify", folder, "--session", "nobody")
    assert status == 1 and "no file is of that session" in err


@pytest.mark.parametrize("session", ["plain-0", "a/b\0c-1", ".hidden-0", "naïve\n-0", "x-active.json-0"])
@pytest.mark.parametrize(("trajectory", "n"), [(-1, 0), (0, 0), (12, 3)])
def test_names_are_understood(session: str, trajectory: int, n: int) -> None:
    assert reading.name_of("/some/where/" + dump_name(session, trajectory, n)) == (session, trajectory, n)


# -- export ------------------------------------------------------------------------------------------------
def test_export_to_json_is_the_export_form(folder: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    status, said, _ = run("export", folder, "-o", out)
    assert status == 0 and "6 interactions of 4 files" in said
    merged: dict[str, Any] = {}
    for path in folder.iterdir():
        merged |= json.loads(path.read_text())
    assert json.loads(out.read_text()) == {"interactions": merged}


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_export_of_tensors(folder: Path, run: Run, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"all.{ending}"
    status, said, _ = run("export", folder, "-o", out)
    assert status == 0 and "4 interactions of 4 files" in said and "2 without tensors left out" in said
    found = load_file(out) if ending == "safetensors" else np.load(out)
    value = json.loads((folder / GOOD).read_text())
    for interaction_id, entry in value.items():
        for name, raw in entry["tensor_dict"].items():
            array = found[f"{interaction_id}/{name}"]
            assert list(array.shape) == raw["shape"]
            assert base64.b64encode(np.ascontiguousarray(array).tobytes()).decode() == raw["data"]
    assert len(found) == 4 * 6
    if ending == "safetensors":
        with safe_open(out, "np") as opened:
            metadata = opened.metadata()
        assert set(json.loads(metadata["rewards"]).values()) == {0.25}
        assert set(json.loads(metadata["sources"]).values()) == {GOOD, "a%2Fä-0-trajectory-0.json"}


def test_export_replaces_nothing_unasked(folder: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    out.write_text("mine")
    status, _, err = run("export", folder, "-o", out)
    assert status == 1 and "--force" in err and out.read_text() == "mine"
    assert run("export", folder, "-o", out, "--force")[0] == 0
    assert out.read_text() != "mine"


def test_a_failed_export_leaves_nothing(folder: Path, run: Run, tmp_path: Path) -> None:
    (folder / GOOD).write_bytes((folder / GOOD).read_bytes()[:-100])
    for ending in ("json", "safetensors", "npz"):
        status, _, err = run("export", folder, "-o", tmp_path / f"x.{ending}")
        assert status == 1 and GOOD in err
    assert [p.name for p in tmp_path.iterdir()] == ["dumps"]


def test_an_id_in_two_files_cannot_be_exported(folder: Path, run: Run, tmp_path: Path) -> None:
    (folder / (GOOD + ".1")).write_bytes((folder / GOOD).read_bytes())
    status, _, err = run("export", folder, "-o", tmp_path / "x.json")
    assert status == 1 and ", too" in err


@pytest.mark.parametrize("ending", ["json", "safetensors", "npz"])
def test_an_id_that_is_no_text_can_be_exported(folder: Path, run: Run, tmp_path: Path, ending: str) -> None:
    def rename(value: Any) -> None:
        old = next(iter(value))
        value["chatcmpl-\ud800"] = value.pop(old) | {"interaction_id": "chatcmpl-\ud800"}

    change(folder, rename)
    assert run("export", folder, "-o", tmp_path / f"all.{ending}")[0] == 0


@pytest.mark.parametrize("output", ["x", "x.txt"])
def test_an_unknown_form_is_refused(folder: Path, run: Run, tmp_path: Path, output: str) -> None:
    status, _, err = run("export", folder, "-o", tmp_path / output)
    assert status == 1 and "--form" in err


# -- what never was written --------------------------------------------------------------------------------
def tensors(edit: Callable[[dict[str, Any]], object]) -> Callable[[Any], object]:
    return lambda value: edit(first(value)["tensor_dict"])


N = len(PROMPT) + len(ANSWER)
DAMAGE: list[tuple[Callable[[Any], object], str]] = [
    (lambda v: v.clear(), "no interactions"),
    (lambda v: v.update(x=3), "an object is expected, not a number"),
    (lambda v: first(v).update(interaction_id="other"), "interaction_id differs"),
    (lambda v: first(v).update(reward=float("nan")), "reward is not finite"),
    (lambda v: first(v).update(reward=float("inf")), "reward is not finite"),
    (lambda v: first(v).update(reward=10**400), "reward is not finite"),
    (lambda v: first(v).update(reward="1"), "reward is a string"),
    (lambda v: first(v).update(reward=True), "reward is true or false"),
    (lambda v: first(v).update(reward=0.5), "rewards: not the interaction's reward"),
    (lambda v: first(v).update(tensor_dict=[]), "tensor_dict is a list"),
    (lambda v: first(v).pop("tensor_dict"), "neither a tensor_dict nor a list of messages"),
    (tensors(lambda t: t.pop("versions")), "versions is missing"),
    (tensors(lambda t: t.update(versions=7)), "versions: no tensor"),
    (tensors(lambda t: t["input_ids"].update(dtype="torch.complex64")), "dtype"),
    (tensors(lambda t: t["input_ids"].update(dtype=None)), "dtype"),
    (tensors(lambda t: t["input_ids"].update(dtype="torch.float64")), "input_ids: dtype float64, but int64"),
    (tensors(lambda t: t["input_ids"].update(shape=[1, N + 1])), "bytes of data, but shape"),
    (tensors(lambda t: t["input_ids"].update(shape=[1, 1 << 47])), "bytes of data, but shape"),
    (tensors(lambda t: t["input_ids"].update(shape=[1, 1 << 60])), "is no list of sizes"),
    (tensors(lambda t: t["input_ids"].update(shape=[-1, -N])), "is no list of sizes"),
    (tensors(lambda t: t["input_ids"].update(shape=[True, N])), "is no list of sizes"),
    (tensors(lambda t: t["input_ids"].update(shape=None)), "is no list of sizes"),
    (tensors(lambda t: t["input_ids"].update(shape=[N])), "shape"),
    (tensors(lambda t: t["input_ids"].update(data="%%%")), "no valid base64"),
    (tensors(lambda t: t["input_ids"].update(data="é")), "no valid base64"),
    (tensors(lambda t: t["input_ids"].update(data=None)), "data is null"),
    (tensors(lambda t: t.update(input_ids=array([1, 2]))), "lengths differ"),
    (tensors(lambda t: t.update(input_ids=array([-5] * N))), "negative ids"),
    (tensors(lambda t: t.update(loss_mask=array([2] * N))), "neither 0 nor 1"),
    (tensors(lambda t: t.update(loss_mask=array([0] * N))), "versions: not -1 for every prompt token"),
    (tensors(lambda t: t.update(logprobs=array([-1.0] * N, "float32"))), "logprobs: not 0 for every prompt"),
    (tensors(lambda t: t.update(logprobs=array([float("nan")] * N, "float32"))), "logprobs: not finite"),
    (tensors(lambda t: t.update(attention_mask=array([False] * N, "bool"))), "masked out"),
    (tensors(lambda t: t["attention_mask"].update(data=base64.b64encode(b"\7" * N).decode())), "neither 0"),
    (tensors(lambda t: t.update(rewards=array([0.25, 1.0], "float32", [2]))), "rewards: shape [2]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "why"), DAMAGE, ids=[why[:30] + str(i) for i, (_, why) in enumerate(DAMAGE)]
)
def test_verify_finds(folder: Path, run: Run, edit: Callable[[Any], object], why: str) -> None:
    change(folder, edit)
    status, out, _ = run("verify", folder)
    assert status == 1
    assert any(GOOD in line and why in line for line in out.splitlines()), out
    assert out.splitlines()[-1].startswith("3 of 4 files")
    for command in ("list", "show"):
        assert run(command, folder)[0] in (0, 1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty file"),
        (b"{", "truncated or no JSON"),
        (b"null", "a JSON object is expected, not null"),
        (b"[1]", "a JSON object is expected, not a list"),
        (b"\xff\xfe", "not UTF-8: byte 0 of 2"),
        (b"[" * 100_000, "no JSON of ours: nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "no JSON of ours"),
        (b"{} {}", "no JSON: Extra data"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
    ],
)
def test_what_is_no_dump_is_a_line(folder: Path, run: Run, data: bytes, why: str) -> None:
    (folder / GOOD).write_bytes(data)
    status, out, _ = run("verify", folder)
    assert status == 1 and f"{GOOD}: {why}" in out
    for command in ("list", "show"):
        status, _, err = run(command, folder)
        assert status == 1 and f"{GOOD}: {why}" in err and len(err.splitlines()) == 1


def test_names_that_come_twice_are_found(folder: Path, run: Run) -> None:
    data = (folder / GOOD).read_text()
    body = data[1:-1]
    (folder / GOOD).write_text("{" + body + ", " + body + "}")
    status, out, _ = run("verify", folder / GOOD)
    assert status == 1 and out.count("more than once") == 2
    (folder / GOOD).write_text(data.replace('"reward": 0.25,', '"reward": 7, "reward": 0.25,', 1))
    assert "member reward is there more than once" in run("verify", folder / GOOD)[1]


def test_the_same_interaction_in_two_files(folder: Path, run: Run) -> None:
    (folder / (GOOD + ".1")).write_bytes((folder / GOOD).read_bytes())
    status, out, _ = run("verify", folder)
    assert status == 1 and out.count(f"{GOOD}, too") == 2 and "4 of 5 files" in out


def test_leftovers_are_found_once_they_are_old(folder: Path, run: Run) -> None:
    left = folder / ".00ff-1.tmp"
    left.write_bytes(b"{")
    assert run("verify", folder)[0] == 0, "a running proxy may be writing it"
    old = time.time() - 3600
    os.utime(left, (old, old))
    status, out, _ = run("verify", folder)
    assert status == 1 and "a write that did not end, 60 min ago" in out and "1 leftovers" in out


def test_files_that_are_none(folder: Path, run: Run) -> None:
    """A pipe must not hang it, nor a folder or a dangling link end it."""
    os.mkfifo(folder / "pipe-0-active.json")
    (folder / "folder-0-active.json").mkdir()
    os.symlink("nowhere", folder / "link-0-active.json")
    status, out, _ = run("verify", folder)
    assert status == 1 and "4 of 7 files" in out
    assert "pipe-0-active.json: not a regular file" in out
    assert "folder-0-active.json: not a regular file" in out or "Is a directory" in out
    assert "link-0-active.json: No such file" in out


def test_a_huge_file_is_not_read(folder: Path, run: Run) -> None:
    with open(folder / "huge-0-active.json", "wb") as file:
        file.truncate(1 << 40)
    status, out, _ = run("verify", folder)  # reading it would take longer than any watchdog
    assert status == 1 and "are more than --max-file-bytes" in out


@pytest.mark.parametrize("command", ["list", "show", "verify"])
@pytest.mark.parametrize("path", ["/no/such/folder", "a\0b"])
def test_a_path_that_is_not_there(run: Run, command: str, path: str) -> None:
    status, _, err = run(command, path)
    assert status == 1 and len(err.splitlines()) == 1


def test_a_tokenizer_that_does_not_load(folder: Path, run: Run) -> None:
    status, _, err = run("show", folder, "--tokenizer-path", "/no/such/tokenizer")
    assert status == 1 and "cannot load the tokenizer" in err


def test_an_empty_folder(tmp_path: Path, run: Run) -> None:
    assert run("verify", tmp_path)[0] == 0
    assert run("list", tmp_path)[0] == 0
    assert run("export", tmp_path, "-o", tmp_path / "x.json")[0] == 1


def test_every_truncation_is_found(folder: Path, run: Run, written: dict[str, bytes]) -> None:
    data = written[GOOD]
    for cut in range(0, len(data), 37):
        (folder / GOOD).write_bytes(data[:cut])
        status, out, _ = run("verify", folder / GOOD)
        assert status == 1 and out.startswith(str(folder / GOOD)), cut


@pytest.mark.parametrize("form", ["json", "safetensors", "npz"])
@pytest.mark.parametrize("where", [b"chatcmpl-", b"input_ids"])
def test_half_characters_in_names_can_be_exported(
    folder: Path, run: Run, written: dict[str, bytes], form: str, where: bytes
) -> None:
    (folder / GOOD).write_bytes(written[GOOD].replace(where, b"\\ud800" + where, 1))
    status, out, err = run("export", folder / GOOD, "-o", folder / f"out.{form}")
    assert (status, err) == (0, ""), out


def test_half_characters_in_names_can_be_told(folder: Path, run: Run, written: dict[str, bytes]) -> None:
    """Of tensors that are known or not, of the right shape or not."""
    text = written[GOOD].decode()
    for old in ('"input_ids"', '"rewards"', '"attention_mask"'):
        for shape in ("[1]", "[1, 2]", "[]"):
            changed = text.replace(old, old[:-1] + '\\ud800"').replace('"shape": [1]', f'"shape": {shape}')
            (folder / GOOD).write_text(changed)
            for command in ("list", "show", "verify"):
                assert run(command, folder / GOOD)[0] in (0, 1)


def test_damaged_bytes_never_raise(folder: Path, run: Run, written: dict[str, bytes], seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        data = bytearray(written[GOOD])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            odd = [b"", b'"', b"{", b"}", b"null", b"-1", b"1e999", b"\\ud800", b"[", b",", bytes([at % 256])]
            data[at : at + chance.randint(0, 3)] = chance.choice(odd)
        (folder / GOOD).write_bytes(data)
        for command in ("list", "show", "verify"):
            assert run(command, folder / GOOD)[0] in (0, 1)
        assert run("export", folder / GOOD, "-o", folder / "out.npz", "--force")[0] in (0, 1)
