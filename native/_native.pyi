"""Types of the compiled module: cffi's objects are dynamic."""

from typing import Any

ffi: Any
lib: Any
