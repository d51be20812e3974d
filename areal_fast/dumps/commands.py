"""`areal-fast dumps`: what a person does with dump files.

  list    one line a file: session, trajectory, interactions, tokens, reward, size, time
  show    one file's interactions; their text, too, if a tokenizer is given
  verify  is every file as it was written; exit status 1 and one line for each thing that is not
  export  back into export form: JSON, safetensors or npz

PATHs are directories (their dumps, not those in folders below) or files. Exit status: 0, 1 if something is
wrong with a file or could not be done, 2 for a bad command line. A reader that closes the pipe early (head)
ends the run quietly.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from areal_fast.dumps import reading
from areal_fast.dumps.exporting import export
from areal_fast.dumps.reading import ACTIVE, Array, Damaged, Dump, Unreadable, facts, load, plain, problems

if TYPE_CHECKING:
    from areal_fast.engine.tokenizer import Tokenizer

FRESH_S: Final = 60.0
"""A temporary file younger than this may be one that a running proxy writes."""
SHOWN_CHARS: Final = 2000
UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


class Failed(Exception):
    """The command cannot be done. str() is the line for stderr."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `areal-fast dumps …`; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (Failed, Damaged, Unreadable) as error:
        return _complain(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; no word at exit
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="areal-fast dumps", description="Dump files, read and checked.")
    commands = parser.add_subparsers(required=True, metavar="list|show|verify|export")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        made.add_argument("paths", nargs="+", metavar="PATH", help="a directory of dumps, or a file")
        made.add_argument("--session", help="only this session's files")
        made.add_argument("--trajectory", help="only this trajectory: a number, or 'active'")
        made.add_argument(
            "--max-file-bytes", type=int, default=reading.DEFAULT_MAX_BYTES, help="larger files are not read"
        )
        return made

    command("list", _list, "One line a file.")
    show = command("show", _show, "The interactions of dumps, one by one.")
    show.add_argument("--tokenizer-path", help="decode prompts and answers with this tokenizer")
    show.add_argument("--full", action="store_true", help="whole texts, however long")
    command("verify", _verify, "Whether every file is as it was written.")
    out = command("export", _export, "Back into export form, all files in one.")
    out.add_argument("-o", "--output", required=True, metavar="FILE")
    out.add_argument("--form", choices=("json", "safetensors", "npz"), help="else by FILE's ending")
    out.add_argument("--force", action="store_true", help="replace FILE if it exists")
    return parser


# -- which files -------------------------------------------------------------------------------------------
def _paths(args: argparse.Namespace) -> list[str]:
    """The dumps meant, sorted by name within each PATH. Failed if a PATH is not there."""
    found: list[str] = []
    for path in args.paths:
        try:
            if os.path.isdir(path):
                listed = [os.path.join(path, name) for name in _sorted(os.listdir(path))]
                found += [each for each in listed if reading.name_of(each) is not None]
            else:
                os.stat(path)
                found.append(path)
        except (OSError, ValueError) as error:
            raise Failed(f"{plain(path)}: {getattr(error, 'strerror', None) or error}") from None
    wanted = [path for path in dict.fromkeys(found) if _wanted(path, args)]
    if found and not wanted:
        raise Failed("no file is of that session and trajectory")
    return wanted


def _wanted(path: str, args: argparse.Namespace) -> bool:
    named = reading.name_of(path)
    if args.session is not None and (named is None or named.session_id != args.session):
        return False
    if args.trajectory is None:
        return True
    shown = None if named is None else "active" if named.trajectory == ACTIVE else str(named.trajectory)
    return bool(shown == args.trajectory)


def _sorted(names: list[str]) -> list[str]:
    """As a person counts: trajectory-10 after trajectory-9."""
    return sorted(
        names, key=lambda name: [(len(p), p) if p.isdigit() else (0, p) for p in re.split(r"(\d+)", name)]
    )


# -- list --------------------------------------------------------------------------------------------------
def _list(args: argparse.Namespace) -> int:
    rows = [("session", "trajectory", "turns", "tokens", "generated", "reward", "size", "time")]
    total = [0, 0, 0, 0, 0]
    status = 0
    for path in _paths(args):
        try:
            dump = load(path, args.max_file_bytes)
            found = facts(dump)
        except (Damaged, Unreadable) as error:
            status = _complain(f"{plain(path)}: {error}")
            continue
        for i, n in enumerate((1, found.interactions, found.tokens, found.output, dump.size)):
            total[i] += n
        rows.append(
            (
                *_titles(dump),
                str(found.interactions),
                str(found.tokens),
                str(found.output),
                "-" if found.reward is None else f"{found.reward:.6g}",
                _size(dump.size),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(dump.mtime)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            c.ljust(w) if i in (0, 7) else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    files, turns, tokens, output, size = total
    print(f"{files} files, {turns} interactions, {tokens} tokens ({output} generated), {_size(size)}")
    return status


def _titles(dump: Dump) -> tuple[str, str]:
    """Session and trajectory for people; a second file of one name says so."""
    named = dump.named
    if named is None:
        return plain(os.path.basename(dump.path)), "?"
    trajectory = "active" if named.trajectory == ACTIVE else str(named.trajectory)
    return plain(named.session_id, 60), trajectory + (f" (.{named.n})" if named.n else "")


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), 0
    while value >= 1024 and unit + 1 < len(UNITS):
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


# -- show --------------------------------------------------------------------------------------------------
def _show(args: argparse.Namespace) -> int:
    tokenizer = _tokenizer(args.tokenizer_path)
    status = 0
    for path in _paths(args):
        try:
            dump = load(path, args.max_file_bytes)
        except Unreadable as error:
            status = _complain(f"{plain(path)}: {error}")
            continue
        session, trajectory = _titles(dump)
        print(f"{plain(path)}: session {session}, trajectory {trajectory}, {_size(dump.size)}")
        for interaction_id, entry in dump.members.items():
            try:
                for line in _interaction(interaction_id, entry, tokenizer, 0 if args.full else SHOWN_CHARS):
                    print(f"  {line}")
            except Damaged as error:
                status = _complain(f"{plain(path)}: interaction {plain(interaction_id, 48)}: {error}")
        print()
    return status


def _tokenizer(path: str | None) -> Tokenizer | None:
    if path is None:
        return None
    from areal_fast.engine.tokenizer import TokenizerError, load_tokenizer

    try:
        return load_tokenizer(path)
    except (TokenizerError, OSError, ValueError) as error:
        raise Failed(f"cannot load the tokenizer {plain(path)}: {' '.join(str(error).split())}") from None


def _interaction(interaction_id: str, entry: Any, tokenizer: Tokenizer | None, width: int) -> Iterator[str]:
    if not isinstance(entry, dict):
        raise Damaged(f"an object is expected, not {reading.kind(entry)}")
    reward = reading.reward_of(entry)
    said = f"{plain(interaction_id)}: reward {'none' if reward is None else f'{reward:.6g}'}"
    raw = reading.tensors_of(entry)
    if raw is None:
        yield f"{said}, text only"
        for name in ("messages", "output_message_list"):
            messages = entry.get(name)
            for message in messages if isinstance(messages, list) else ():
                if isinstance(message, dict):
                    role = plain(str(message.get("role")), 24)
                    yield from _text(role, str(message.get("content")), width)
        return
    arrays: dict[str, Array] = {}
    for name in ("input_ids", "loss_mask", "logprobs", "versions"):
        try:
            arrays[name] = reading.tensor(raw.get(name)).reshape(-1)
        except Damaged as error:
            raise Damaged(f"{name}: {error}") from None
    if len({array.size for array in arrays.values()}) > 1:
        raise Damaged("tensors of different lengths")
    out = arrays["loss_mask"] != 0
    ids, logprobs = arrays["input_ids"], arrays["logprobs"][out]
    mean = f", mean logprob {float(np.mean(logprobs, dtype=np.float64)):.4f}" if logprobs.size else ""
    versions = ", ".join(f"{v} ({n})" for v, n in _runs(arrays["versions"][out]))
    n = int(out.sum())
    yield f"{said}, {out.size - n} prompt + {n} output tokens{mean}, versions {versions or '-'}"
    if tokenizer is not None:
        yield from _text("prompt", _decode(tokenizer, ids[~out]), width)
        yield from _text("output", _decode(tokenizer, ids[out]), width)


def _decode(tokenizer: Tokenizer, ids: Array) -> str:
    known = ids[(ids >= 0) & (ids < tokenizer.vocab_size)]
    note = "" if known.size == ids.size else f" [{ids.size - known.size} ids are not this tokenizer's]"
    return tokenizer.decode(known.tolist()) + note


def _runs(versions: Array) -> Iterator[tuple[int, int]]:
    """(version, tokens) of equal neighbours."""
    if versions.size:
        cuts = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), versions.size]
        for a, b in itertools.pairwise(cuts):
            yield int(versions[a]), b - a


def _text(title: str, text: str, width: int) -> Iterator[str]:
    cut = len(text) - width if width and len(text) > width else 0
    kept = text[: len(text) - cut]
    for i, line in enumerate(kept.split("\n")):
        yield f"  {title + ':' if i == 0 else '':<10} {plain(line)}"
    if cut:
        yield f"  {'':<10} … {cut} characters more (--full)"


# -- verify ------------------------------------------------------------------------------------------------
def _verify(args: argparse.Namespace) -> int:
    files = wrong = 0
    seen: dict[str, str] = {}
    for path in _paths(args):
        files += 1
        before = wrong
        try:
            dump = load(path, args.max_file_bytes)
        except Unreadable as error:
            print(f"{plain(path)}: {error}")
            wrong += 1
            continue
        for what in [*problems(dump), *_known(dump, seen)]:
            if wrong == before:
                wrong += 1
            print(f"{plain(path)}: {what}")
    left = list(_leftovers(args)) if args.session is None and args.trajectory is None else []
    for line in left:
        print(line)
    good = files - wrong
    print(f"{good} of {files} files are as they were written" + (f", {len(left)} leftovers" if left else ""))
    return 1 if wrong or left else 0


def _known(dump: Dump, seen: dict[str, str]) -> Iterator[str]:
    """Interactions that an earlier file has, too."""
    for interaction_id in dump.members:
        if interaction_id in seen:
            yield f"interaction {plain(interaction_id, 48)} is in {plain(seen[interaction_id])}, too"
        else:
            seen[interaction_id] = dump.path


def _leftovers(args: argparse.Namespace) -> Iterator[str]:
    """Temporary files that no proxy writes any more."""
    for folder in args.paths:
        if not os.path.isdir(folder):
            continue
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if reading.TEMPORARY.fullmatch(name) is None:
                continue
            try:
                age = time.time() - os.lstat(path).st_mtime
            except OSError:
                continue  # renamed or removed meanwhile
            if age >= FRESH_S:
                yield f"{plain(path)}: a write that did not end, {age / 60:.0f} min ago"


# -- export ------------------------------------------------------------------------------------------------
def _export(args: argparse.Namespace) -> int:
    form = args.form or os.path.splitext(args.output)[1].removeprefix(".")
    if form not in ("json", "safetensors", "npz"):
        raise Failed("--form json|safetensors|npz, or an output of that ending")
    paths = _paths(args)
    if not paths:
        raise Failed("there is no dump")
    try:
        done = export(paths, args.output, form, args.max_file_bytes, replace=args.force)
    except OSError as error:
        raise Failed(f"{plain(args.output)}: {error.strerror or error}") from None
    left = f"; {done.skipped} without tensors left out" if done.skipped else ""
    said = f"{done.interactions} interactions of {len(paths)} files, {_size(done.size)}{left}"
    print(f"{plain(args.output)}: {said}")
    return 0


def _complain(why: str) -> int:
    print(f"areal-fast dumps: {why}", file=sys.stderr)
    return 1
