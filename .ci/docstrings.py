"""What griffe, which reads the docstrings for the reference, is told about their style."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """`Example:` is the section that griffe knows as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
