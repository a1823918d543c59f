"""Two real Xen hosts on one ordinary machine, in QEMU's software emulation: `deploy/lab`, and what the tests in
tests/xen drive. docs/lab.md says what it can do. It needs nothing but Python and Debian packages (needs.py).
"""
