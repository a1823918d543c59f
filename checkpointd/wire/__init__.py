"""Our protocol between primary and secondary, on ZeroMQ; docs/wire-protocol.md is its specification."""
