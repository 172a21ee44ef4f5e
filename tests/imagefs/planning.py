"""Plans over layers of a few blocks."""

from __future__ import annotations

from imagefs import blockmap, errors, plan

ERROR = errors.UnavailableError("down")
BLOCK_COMPRESSED = 1000


def map_of(blocks: int, compressed: int = BLOCK_COMPRESSED) -> blockmap.BlockMap:
    table = tuple(blockmap.Block(bytes(32), n * compressed, compressed) for n in range(blocks))
    return blockmap.BlockMap(
        block_bytes=65536,
        frame_bytes=65536,
        image_bytes=blocks * 65536,
        blob_bytes=blocks * compressed,
        metadata_offset=0,
        metadata_bytes=4096,
        blob_digest=bytes(32),
        source_digest=bytes(32),
        diff_id=bytes(32),
        chain_id=None,
        compression_level=1,
        libzstd_version=10507,
        root_implied=False,
        blocks=table,
    )


def plan_of(*layers: tuple[str, str], policy: plan.Policy | None = None) -> plan.Plan[str]:
    made: plan.Plan[str] = plan.Plan(policy or plan.Policy())
    for layer, origin in layers:
        made.add_layer(layer, origin, map_of(64))
    return made


def indices(fetch: plan.Fetch | None) -> tuple[int, ...] | None:
    return fetch.indices if fetch else None
