"""checkpointd keeps a running virtual machine alive through the loss of its host.

See docs/architecture.md for the parts and the invariants they keep.
"""

from __future__ import annotations

__version__ = "0.1.0"
