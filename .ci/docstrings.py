"""An extension of griffe, which reads the docstrings for the reference."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Reads the section `Example:` as griffe's `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section in the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
