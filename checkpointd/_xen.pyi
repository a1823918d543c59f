# Types of the compiled module, whose interface is the cdef of hypervisor/xen/csrc/build_xen.py.

from typing import Any

# Structs, arrays, pointers and functions of C: what they are, the cdef says and mypy cannot know.
ffi: Any
lib: Any
