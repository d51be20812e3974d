"""Shards: immutable tensors with an id, kept in the arena's memory, handed out as JSON or as raw bytes.

`ShardStore` takes tensors that others put, and the bundles that exports leave. Other ways for a shard to
travel (a descriptor on the same host: local.py; GPU) come beside this one with the same nouns.
"""

from areal_fast.shards.bundles import Bundle, BundleMeta, new_bundle_id
from areal_fast.shards.outgoing import Outgoing, RawOutgoing
from areal_fast.shards.store import ShardStore

__all__ = ["Bundle", "BundleMeta", "Outgoing", "RawOutgoing", "ShardStore", "new_bundle_id"]
