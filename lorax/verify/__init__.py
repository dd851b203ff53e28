"""Reports: lorax's own numbers measured, and held against other libraries'.

The room is its main function, too: `lorax.verify(adapter)` is `against_peft.verify`, and
`lorax.verify.quantization` and the others still import.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorax.verify.report import Report


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> "Report":
        """See `lorax.verify.against_peft.verify`."""
        from lorax.verify.against_peft import verify

        return verify(*arguments, **options)


sys.modules[__name__].__class__ = _Room  # Python's own way to give a module a method
