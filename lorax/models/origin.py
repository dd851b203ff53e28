"""Which files a model comes from, whatever has become of its weights since."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origin:
    """A model directory, and its config.json's content as it stands there.

    What is written of the model later keeps all that these say and that has not changed.
    """

    directory: Path
    config: dict[str, Any]
