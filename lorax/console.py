r"""The terminal: the one place through which everything that people read goes.

Names of tensors, templates' errors, a base's name come from strangers' files. Printed as they are,
`[/x]` would be rich's markup and `\x1b[2J` would clear the screen. Here a text is a text: no markup
and no highlighting, and a control character is shown as \x1b.
"""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.text import Text

from lorax.text import one_line, visible


class PlainConsole(Console):
    """rich's console, for which no string is anything but its characters; tables' cells too."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """rich turns every string into a `Text` here."""
        return super().render_str(visible(text, keep="\n\t"), **options)

    def say_line(self, text: object, label: str = "") -> None:
        """Print one line that is not wrapped, a label in red before it."""
        self.print(Text.assemble((label, "bold red"), one_line(text)), soft_wrap=True)


class ConsoleLog(logging.Handler):
    """Warnings of lorax's log, each as a line on a console."""

    def __init__(self, console: PlainConsole):
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record's message."""
        self._console.say_line(record.getMessage())
