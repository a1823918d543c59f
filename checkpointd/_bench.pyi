from typing import Any

class CData: ...

ffi: Any
lib: Any
