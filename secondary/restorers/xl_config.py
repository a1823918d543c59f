"""The configuration by which xl builds a replica's domain, made true for the guest as it is now. Pure."""

from __future__ import annotations

import json

from checkpointd.hypervisor.port import PAGE_SIZE


def with_room(config: str, pages: int) -> str:
    """`config`, libxl's JSON of when protection began, for a guest that has `pages` of memory now.

    libxl lets a domain have no more than its target (b_info.target_memkb, and 1 MiB), so that one which was ballooned
    up since could not be built. Its maximum stays what it is. What is no such JSON is left for xl to complain of.
    """
    try:
        fields = json.loads(config)
        build = fields["b_info"]
        target = int(build["target_memkb"])
        needed = min(pages * PAGE_SIZE // 1024, int(build.get("max_memkb", target)))
        if needed <= target:
            return config
        build["target_memkb"] = needed
    except (ValueError, TypeError, KeyError, AttributeError):
        return config
    return json.dumps(fields, separators=(",", ":"))
