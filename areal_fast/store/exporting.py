"""Exports in two steps: promise, then keep or take back.

`begin` finds what is to be exported, appends an EXPORTING record to every session involved (one txn word for
all of them), stores the bundle and builds the reply. Nothing is exported yet: if this process dies, the sweep
aborts the txn word and everything is ready again. `Export.delivered` (the reply left in full) commits the
word, which exports all of it at once and removes the sessions flagged so; `undelivered` takes it back.

This is how a reply that never arrived is replayed to an identical request, removal included: nothing has
changed for it, so it is made again from the same records, by whichever worker. The EXPORTING record, which
stays in the log though it was taken back, says which trajectory that request was given: for 60 s it is given
the same one, though a newer one may have become ready, which then is the next request's.

The sessions stay pinned from begin to end: the cleaner leaves them alone, and a sweep finds what a dead
exporter had committed. EXPORTING records are appended in slot order, so that of two exports over the same
sessions one gets them all; the other meets ExportBusy and is to be repeated a little later.

Removal (WIRE "Export"): with a trajectory_id only that trajectory goes, and the session when nothing else is
left and nobody else uses it; without one the session goes, in the list dialects unready ones too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from areal_fast.core import Gone, HeadMoved, Trimmed
from areal_fast.errors import (
    EmptySessionList,
    ExportBusy,
    NoReadyTrajectories,
    SessionNotFound,
    TrajectoryNotFound,
)
from areal_fast.protocol import records as rec
from areal_fast.protocol.export import NAMES, Row, Rows, discounted, leaves, lineage, row_of
from areal_fast.protocol.messages import ExportRequest
from areal_fast.protocol.sessions import FLAG_REMOVE, Interaction
from areal_fast.shards.bundles import BundleMeta, new_bundle_id
from areal_fast.store.session import Session

if TYPE_CHECKING:
    from areal_fast.store.store import SessionStore

MAX_BUNDLE_PARTS = 1 << 16


class _Taken(NamedTuple):
    """One session of an export: the trajectory that it gives, and the ordinals in it; None and none if
    nothing of it is exported."""

    session: Session
    trajectory: int | None
    ordinals: Sequence[int] = ()


class _Item(NamedTuple):
    """One interaction of the reply, with its discounted reward, the one that was set, and record data."""

    slot: int
    interaction: Interaction
    reward: float
    original: float
    data: bytes


class Export:
    """A reply that may still be taken back. Call delivered() or undelivered() once; more calls do nothing.

    body: the JSON reply. interactions: how many it holds."""

    def __init__(
        self,
        store: SessionStore,
        taken: list[_Taken],
        txn: int,
        body: bytes,
        bundles: list[str],
        interactions: int,
    ) -> None:
        self.body = body
        self.interactions = interactions
        self._store = store
        self._taken = taken
        self._txn = txn
        self._bundles = bundles
        self._open = True

    def delivered(self) -> None:
        """The reply was fully written: what it holds is exported, what was to go is gone."""
        if not self._open:
            return
        self._open = False
        if self._txn:
            self._store.arena.txn_commit(self._txn)
            self._store.settle_txn(self._txn, True, [t.session for t in self._taken])
        else:
            self._store.release_all([t.session for t in self._taken])

    def undelivered(self) -> None:
        """The reply did not arrive: everything is ready again, its shards are dropped."""
        if not self._open:
            return
        self._open = False
        for prefix in self._bundles:
            self._store.shards.drop_bundle(prefix)
        _abort(self._store, self._txn, self._taken)


def begin(store: SessionStore, request: ExportRequest, *, patient: bool = False) -> Export:
    """Everything up to the reply. EmptySessionList; for pr1268 SessionNotFound, NoReadyTrajectories,
    TrajectoryNotFound; ExportBusy: wait and repeat; ArenaFull: nothing happened.

    patient: a session that is to go and that another process still holds is ExportBusy, not kept: mostly that
    process has answered already and is about to let go. Who repeats says False after a while."""
    if not request.session_ids:
        raise EmptySessionList
    sessions = _open(store, request)
    taken: list[_Taken] = []
    txn = 0
    bundles: list[str] = []
    asked = hashlib.blake2b(rec.pack(request), digest_size=16).digest()
    try:
        txn = store.arena.txn_begin() if sessions else 0
        for session in sorted(sessions, key=lambda s: s.slot):
            taken.append(_take(store, request, asked, session, txn, patient))
        order = {session.slot: i for i, session in enumerate(sessions)}
        taken.sort(key=lambda t: order[t.session.slot])
        items = _collect(store, request, taken)
        body = _reply(store, request, items, bundles)
        return Export(store, taken, txn, body, bundles, len(items))
    except BaseException:
        for prefix in bundles:
            store.shards.drop_bundle(prefix)
        unpromised = [s for s in sessions if all(t.session is not s for t in taken)]
        _abort(store, txn, taken)
        store.release_all(unpromised)
        raise


def _open(store: SessionStore, request: ExportRequest) -> list[Session]:
    """The sessions that exist, pinned, each once, in request order."""
    sessions: list[Session] = []
    seen: set[str] = set()
    for session_id in request.session_ids:
        if session_id in seen:
            continue
        seen.add(session_id)
        session = store.by_id(session_id)
        if session is not None:
            sessions.append(session)
        elif request.dialect == "pr1268":
            store.release_all(sessions)
            raise SessionNotFound(session_id)
    return sessions


def _take(
    store: SessionStore, request: ExportRequest, asked: bytes, session: Session, txn: int, patient: bool
) -> _Taken:
    """Decide for one session and append its EXPORTING record, if it needs one. `asked`: the request's
    hash."""
    while True:
        now_ns = store.now_ns()
        state = store.fold(session.slot, session.session_id)
        trajectory: int | None
        try:
            trajectory = state.exportable(session.session_id, request.trajectory_id, asked, now_ns)
        except (NoReadyTrajectories, TrajectoryNotFound):
            if request.dialect == "pr1268":
                raise
            trajectory = None
        remove = request.remove_session
        if remove and request.trajectory_id is not None:
            remove = state.only(trajectory) and not store.in_use_here(session)
            if remove and store.in_use_elsewhere(session):
                if patient:
                    raise ExportBusy
                remove = False
        if trajectory is None and (not remove or state.pending):
            if remove:
                raise ExportBusy
            return _Taken(session, None)
        index = -1 if trajectory is None else trajectory
        ordinals = () if trajectory is None else state.ordinals(trajectory)
        try:
            store.arena.append(
                session.slot,
                rec.EXPORTING,
                rec.pack(rec.Exporting(index, asked, now_ns)),
                expect=state.head,
                aux=txn,
                flags=FLAG_REMOVE if remove else 0,
                critical=True,
            )
        except HeadMoved:
            continue
        except Gone:
            if request.dialect == "pr1268":
                raise SessionNotFound(session.session_id) from None
            return _Taken(session, None)
        return _Taken(session, trajectory, ordinals)


def _collect(store: SessionStore, request: ExportRequest, taken: list[_Taken]) -> list[_Item]:
    """All interactions in order, rewards discounted a trajectory at a time.

    The record data is read at the head the decision was made at; if the log was cut since (a compaction that
    began before our record cannot finish after it), the trajectory is looked up anew: it cannot have gone."""
    items: list[_Item] = []
    for t in taken:
        if t.trajectory is None:
            continue
        while True:
            fold = store.folds.refresh(t.session.slot)
            members = fold.interactions(t.trajectory)
            try:
                found = [
                    (members[k], store.folds.data_of(t.session.slot, fold, members[k])) for k in t.ordinals
                ]
                break
            except Trimmed:
                continue
        rewards = discounted([i.reward for i, _ in found], request.discount)
        items += [
            _Item(t.session.slot, i, r, i.reward or 0.0, data)
            for (i, data), r in zip(found, rewards, strict=True)
        ]
    return items


def _reply(store: SessionStore, request: ExportRequest, items: list[_Item], bundles: list[str]) -> bytes:
    """The JSON reply; bundles made on the way are appended to `bundles`."""
    tokens = [i for i in items if i.interaction.meta is not None]
    if request.style == "concat":
        tokens, rows, data = make_leaves(tokens)
        shown = tokens
        kept = {id(i) for i in shown}
        items = [i for i in items if i.interaction.meta is None or id(i) in kept]
    else:
        rows, data = make_rows(tokens)
    experts = _routed(tokens)
    v2 = request.dialect == "v2"
    if request.dialect in ("pr1268", "main-may"):
        return b'{"interactions":{' + _interactions(store, items, rows, data, experts, bundles) + b"}}"
    if not items:
        return b'{"traj":{}}'
    if len(rows) == len(items):
        if len({width for _, _, width in experts}) > 1:
            experts = []  # of several models: no tensor could hold them
        meta = BundleMeta("batch", rows, v2, experts)
        prefix = _store_bundle(store, meta, data, bundles)
        return b'{"traj":' + store.shards.tensor_dict_json(prefix, meta).encode() + b"}"
    listed = b",".join(
        b'{"request":%b,"response":%b,"reward":%b}' % (*_texts(i), number_json(i.reward)) for i in items
    )
    return b'{"traj":{"interactions":[' + listed + b"]}}"


def _interactions(
    store: SessionStore,
    items: list[_Item],
    rows: list[Row],
    data: list[bytes],
    experts: list[tuple[int, bytes, int]],
    bundles: list[str],
) -> bytes:
    """`"id":{…},…` of every interaction, tensors (`rows`, in order) as references into bundles."""
    tensors = _references(store, rows, data, experts, bundles)
    parts: list[str] = []
    for item in items:
        name = json.dumps(item.interaction.interaction_id)
        if item.interaction.meta is None:
            messages, response = _texts(item)
            content = (
                f'"messages":{messages.decode()},"output_message_list":'
                f'[{{"role":"assistant","content":{response.decode()}}}]'
            )
        else:
            content = f'"tensor_dict":{next(tensors)}'
        parts.append(
            f'{name}:{{{content},"reward":{number_json(item.reward).decode()},"interaction_id":{name}}}'
        )
    return ",".join(parts).encode()


def _references(
    store: SessionStore,
    all_rows: list[Row],
    all_data: list[bytes],
    experts: list[tuple[int, bytes, int]],
    bundles: list[str],
) -> Iterator[str]:
    """Store the rows as bundles; the tensor_dict of each row in turn."""
    out: list[str] = []
    done = 0
    for rows, data in _split(all_rows, all_data, MAX_BUNDLE_PARTS // (len(NAMES) + 1)):
        if not rows:
            continue
        of_these = [
            (row - done, shard, width) for row, shard, width in experts if 0 <= row - done < len(rows)
        ]
        done += len(rows)
        meta = BundleMeta("each", rows, routed=of_these)
        prefix = _store_bundle(store, meta, data, bundles)
        out += [store.shards.tensor_dict_json(prefix, meta, row) for row in range(len(rows))]
    return iter(out)


def _routed(items: list[_Item]) -> list[tuple[int, bytes, int]]:
    """(row, shard, width) of the items that have routed experts."""
    found: list[tuple[int, bytes, int]] = []
    for row, item in enumerate(items):
        m = item.interaction.meta
        if m is not None and m.routed is not None:
            found.append((row, *m.routed))
    return found


def _store_bundle(store: SessionStore, meta: BundleMeta, data: list[bytes], bundles: list[str]) -> str:
    prefix = new_bundle_id()
    store.shards.put_bundle(prefix, meta, data)
    bundles.append(prefix)
    return prefix


def make_rows(items: list[_Item]) -> tuple[list[Row], list[bytes]]:
    """Rows and their data. A reference to an interaction becomes one to its row; all of a trajectory's
    interactions are among the items, so it is always there (before or after the row that refers)."""
    at: dict[tuple[int, int], int] = {}
    for i, item in enumerate(items):
        at[item.slot, item.interaction.ordinal] = i
    rows: list[Row] = []
    data: list[bytes] = []
    for item in items:
        m = item.interaction.meta
        assert m is not None
        ref = -1 if m.ref == rec.NO_REF else at[item.slot, m.ref]
        rows.append(row_of(m, ref, item.reward, item.original))
        data.append(item.data)
    return rows, data


def make_leaves(items: list[_Item]) -> tuple[list[_Item], list[Row], list[bytes]]:
    """Style concat: the leaves among the items of whole trajectories, their rows, written in full, and
    data."""
    rows, data = make_rows(items)
    whole = Rows(rows, b"".join(data))
    trees: dict[tuple[int, int], dict[int, int]] = {}
    for i, item in enumerate(items):
        trees.setdefault((item.slot, item.interaction.trajectory), {})[item.interaction.ordinal] = i
    kept: list[int] = []
    full_rows: list[Row] = []
    full_data: list[bytes] = []
    for tree in trees.values():
        metas = {ordinal: m for ordinal, i in tree.items() if (m := items[i].interaction.meta) is not None}
        for ordinal in leaves(metas):
            i = tree[ordinal]
            line = [tree[k] for k in lineage(metas, ordinal)]
            row = rows[i]
            runs = [run for j in (*line, i) for run in rows[j].runs]
            spans = [(rows[j].prompt_len, rows[j].output_len) for j in line]
            kept.append(i)
            full_rows.append(
                Row(row.prompt_len, row.output_len, -1, 0, runs, row.reward, row.original, spans)
            )
            logprobs = [data[j][4 * rows[j].new_ids :] for j in (*line, i)]
            full_data.append(b"".join((whole.ids(i).tobytes(), *logprobs)))
    return [items[i] for i in kept], full_rows, full_data


def _split(rows: list[Row], data: list[bytes], size: int) -> Iterator[tuple[list[Row], list[bytes]]]:
    """Rows in portions of `size`. Those of several portions are written in full: no reference leaves one."""
    if len(rows) <= size:
        yield rows, data
        return
    whole = Rows(rows, b"".join(data))
    for first in range(0, len(rows), size):
        portion = range(first, min(first + size, len(rows)))
        yield (
            [msgspec.structs.replace(rows[i], ref=-1, shared=0) for i in portion],
            [whole.ids(i).tobytes() + data[i][4 * rows[i].new_ids :] for i in portion],
        )


def _texts(item: _Item) -> tuple[bytes, bytes]:
    """(messages JSON, response text as JSON) of an interaction; of one with tokens, what was kept of it."""
    if (m := item.interaction.meta) is not None:
        messages, text = rec.unpack_words(m.extra)
        return messages, json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass")
    size = item.interaction.messages_size
    response = item.data[size:].decode("utf-8", "surrogatepass")
    return item.data[:size], json.dumps(response, ensure_ascii=False).encode("utf-8", "surrogatepass")


def number_json(value: float) -> bytes:
    """A float as the original prints it; what JSON has no word for is null."""
    return repr(value).encode() if math.isfinite(value) else b"null"


def _abort(store: SessionStore, txn: int, taken: list[_Taken]) -> None:
    if txn:
        store.settle_txn(txn, False, [t.session for t in taken])
    else:
        store.release_all([t.session for t in taken])


__all__ = ["Export", "begin", "make_rows", "number_json"]
