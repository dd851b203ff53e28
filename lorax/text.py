"""A stranger's text, made fit for one line of a terminal or a log."""

import unicodedata

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
