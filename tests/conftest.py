"""Of all tests: hypothesis draws the same examples every time, and no machine is too slow for one of them."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("checkpointd", derandomize=True, deadline=None)
settings.load_profile("checkpointd")
