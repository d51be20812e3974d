"""A shard store over each of the two arenas."""

from typing import Any

import pytest

from areal_fast.shards import ShardStore


@pytest.fixture
def shards(arena: Any) -> ShardStore:
    return ShardStore(arena, "127.0.0.1:8082")
