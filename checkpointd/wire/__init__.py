"""Our protocol between primary and secondary, on ZeroMQ, specified in docs/wire-protocol.md."""
