"""Names and messages of strangers on a terminal: shown, never obeyed (cases 85 and 86)."""

import logging

import pytest
import yaml
from rich.table import Table

from lorax import cli
from lorax.console import ConsoleLog, PlainConsole
from lorax.errors import FormatError, LoraxError
from lorax.formats.adapter_card import yaml_text
from lorax.text import MAX_LINE, one_line, visible

HOSTILE = {
    "\x1b[2J\x1b[31mx": r"\x1b[2J\x1b[31mx",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "a\rb\x08c": r"a\rb\x08c",
    "\x9b31m": r"\x9b31m",
    "abc\u202edef\u2066": r"abc\u202edef\u2066",
    "half \ud800": r"half \ud800",
    "\x00\x7f": r"\x00\x7f",
}
KEPT = [
    "größe",
    "\u540d\u524d",
    "\U0001f468\u200d\U0001f469",
    "a b",
    "[/x] [v2] [red]x[/red] :smile:",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_control_character_is_shown(text):
    assert visible(text) == HOSTILE[text]
    assert "\x1b" not in str(LoraxError(f"tensor {text} has no place"))
    one_line(text).encode("utf-8")


@pytest.mark.parametrize("text", KEPT)
def test_writing_of_any_language_stays(text):
    assert visible(text) == text == one_line(text)


def printed(capsys, *what, width=300):
    console = PlainConsole(width=width)
    for each in what:
        console.print(each, soft_wrap=True)
    return capsys.readouterr().out


@pytest.mark.parametrize("text", [*HOSTILE, *KEPT])
def test_lines_and_tables_print_a_name_as_it_is(capsys, text):
    shown = visible(text, keep="\n\t")
    table = Table(text, title=text)
    table.add_row(text)
    out = printed(capsys, f"wrote {text}", table)
    assert out.count(shown) == 4
    assert "\x1b" not in out


@pytest.mark.parametrize("text", HOSTILE)
def test_the_log_reaches_the_terminal_by_the_same_way(capsys, text):
    log = logging.Logger("lorax.test")
    log.addHandler(ConsoleLog(PlainConsole(stderr=True, width=300)))
    log.warning("%s: [/x] passed over", text)
    assert capsys.readouterr().err == f"{one_line(text)}: [/x] passed over\n"


@pytest.mark.parametrize("size", [MAX_LINE, MAX_LINE + 1, 10**6])
def test_a_line_is_bounded(size):
    text = one_line("a" * (size - 1) + "z")
    assert len(text) <= MAX_LINE
    assert text[0] == "a"
    assert text[-1] == "z"
    assert len(str(FormatError("\x1b" * size))) <= MAX_LINE


@pytest.mark.parametrize("name", ["no[/x]", "no\x1b[2J", "no" + "x" * 100_000])
def test_an_error_of_the_command_line_is_one_plain_line(monkeypatch, capsys, name):
    monkeypatch.setattr("sys.argv", ["lorax", "inspect", "adapter", name])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    err = capsys.readouterr().err
    assert caught.value.code == 3
    assert err.startswith("error: no")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert len(err) <= MAX_LINE + 10


@pytest.mark.parametrize(
    "name",
    ["a: b", "x\n- evil: 1", "---\nlicense: mit", '"', "\x1b[2J", "null", "# x", "[a]", "\u2028"],
)
def test_a_base_name_is_one_text_in_the_cards_front_matter(name):
    assert yaml.safe_load(f"base_model: {yaml_text(name)}\n") == {"base_model": name}
    assert "\x1b" not in yaml_text(name)
