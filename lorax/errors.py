"""Every error that a user can cause, and the exit code that the command line gives it.

A message says in one line what was found, what was expected, and what to do.
"""

import os
import unicodedata
from pathlib import Path

MAX_LINE = 2000  # characters of a message; a stranger's file may be quoted in it


def one_line(text: object) -> str:
    """A message of any library in one line, fit for a terminal: see `visible`.

    Its lines are joined, the empty ones left out; of more than MAX_LINE characters the middle is.
    """
    lines = (line.strip() for line in str(text).splitlines())
    line = visible(" ".join(line for line in lines if line))
    if len(line) <= MAX_LINE:
        return line
    half = MAX_LINE // 2 - 50
    return f"{line[:half]} [... {len(line) - 2 * half} characters ...] {line[-half:]}"


def visible(text: str, keep: str = "") -> str:
    r"""Text in which a control character shows as \x1b, so that it moves no cursor.

    Those that turn the direction of writing (Unicode's Cf), and halves of surrogate pairs, too; the
    joiners inside of emoji and of Indian and Arabic words stay, and so does what is in `keep`.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character in keep or character in _JOINERS or not _acts(character)
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


_JOINERS = "\u200c\u200d"


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def require(path: str | os.PathLike[str]) -> Path:
    """The path with `~` filled in, if something is there.

    Raises:
        EnvironmentProblem: nothing is, or a directory above it cannot be looked into. Every command
            gives a path that is missing the same exit code.
    """
    found = Path(path).expanduser()
    try:
        found.lstat()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(
            f"{found}: cannot be read ({reason}); give a path that exists"
        ) from None
    return found


class LoraxError(Exception):
    """The root of lorax's errors; its message is one line, whatever was quoted in it."""

    exit_code = 4

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


class UsageError(LoraxError):
    """A call or a command that asks for something which does not exist or does not fit."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe whose keys or values are wrong; the message names the key."""


class PluginError(UsageError):
    """A user's own file that is no plugin or fails; the message has its line."""


class EnvironmentProblem(LoraxError):
    """A missing package or device, a full disk, a directory that cannot be written."""

    exit_code = 3


class FormatError(LoraxError):
    """A file that is damaged, hostile or of a kind that lorax does not read."""


class DataError(FormatError):
    """A row of training data that cannot be used; the message names file and line."""


class TemplateError(FormatError):
    """A chat template that fails, or that leaves its sandbox's bounds."""


class UnsupportedModel(FormatError):
    """A model whose architecture or options lorax does not cover."""


class AdapterError(LoraxError):
    """An adapter that does not fit its model, or an operation that its state does not allow."""


class QuantizationError(LoraxError):
    """A tensor that cannot be quantized as asked."""


class NumericalStop(LoraxError):
    """Training met a loss or gradient that is not finite, and stopped."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; no error of the user's, and so no LoraxError.

    exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
