"""Output held until the epoch that produced it is acknowledged."""
