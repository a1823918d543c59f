"""What pyproject.toml has no words for: the cffi modules and the abi3 tag of the wheel."""

from setuptools import setup

setup(
    cffi_modules=[
        "checkpointd/csrc/build_native.py:ffi",
        "checkpointd/hypervisor/embedded/csrc/build_embedded.py:ffi",
        "checkpointd/hypervisor/xen/csrc/build_xen.py:ffi",
        "checkpointd/bench/csrc/build_bench.py:ffi",
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
