"""What burns time or memory inside of a single operation: templates, expressions, counts."""

import json
import struct
import time

import gguf
import numpy as np
import pytest
from mutating import MAX_MEGABYTES
from psutil import Process
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.data import templates
from lorax.data.templates import ChatTemplate
from lorax.errors import FormatError, LoraxError, TemplateError
from lorax.formats.tokenizer_files import write_tokenizer

TEMPLATES = {
    "a string repeated": "{{ 'a' * 10**10 }}",
    "a list repeated": "{{ (range(99999)|list * 100000)|length }}",
    "a range without end": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% for i in range(9999) %}{% for j in range(9999) %}"
    "{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a long separator": "{{ range(90000)|join('x' * 100000) }}",
    "a width of %": "{{ '%1000000000d' % 3 }}",
    "a width of format": "{{ '{:>1000000000}'.format(3) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a number of many digits": "{{ 10**4000000 }}",
    "a list of itself, 60 deep": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_stopped(name, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.7)
    started = time.perf_counter()
    with pytest.raises(TemplateError):
        ChatTemplate(TEMPLATES[name]).render(messages=[])
    assert time.perf_counter() - started < 5
    monkeypatch.undo()
    assert ChatTemplate("{{ 1 + 1 }}").render(messages=[]).text == "2"  # and the next one works


# The expressions of tokenizer.json ------------------------------------------------------------

EXPRESSIONS = [
    ("(a+)+$", "a" * 40 + "b"),
    ("(a|aa)+$", "a" * 60 + "b"),
    ("^(a+a+)+$", "a" * 40 + "b"),
    ("(([a-z])+.)+[A-Z]([a-z])+$", "a" * 60),
]


@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize(("expression", "text"), EXPRESSIONS)
def test_an_expression_that_goes_around_without_end_is_one_error(tmp_path, place, expression, text):
    """Oniguruma gives up after 10 million steps; that is a panic of Rust, and no Exception."""
    write_tokenizer(byte_tokenizer(), tmp_path)
    file = tmp_path / "tokenizer.json"
    pattern = {"Regex": expression}
    rule = {
        "pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": "Isolated",
                          "invert": False},
        "normalizer": {"type": "Replace", "pattern": pattern, "content": "z"},
    }  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | {place: rule[place]}))
    tokenizer = lorax.load_tokenizer(tmp_path)
    started = time.process_time()
    with pytest.raises(FormatError, match="own rules fail on this text") as caught:
        tokenizer.encode(text)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 10
    assert tokenizer.decode([1])


def test_a_panic_is_an_error_and_ctrl_c_is_not():
    tokenizer = byte_tokenizer()

    class PanicException(BaseException):
        pass

    class Backend:
        def __init__(self, error):
            self.error = error

        def encode(self, text, add_special_tokens):
            raise self.error

        def decode(self, ids, skip_special_tokens):
            raise self.error

    for error, expected in ((PanicException("no"), FormatError), (KeyboardInterrupt(),) * 2):
        tokenizer.backend = Backend(error)
        kind = expected if isinstance(expected, type) else KeyboardInterrupt
        with pytest.raises(kind):
            tokenizer.encode("a", add_special_tokens=False)
        with pytest.raises(kind):
            tokenizer.decode([1])


# The counts of GGUF -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A GGUF file with a list of each kind, and where its counts stand."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("a.strings", ["x", "yy"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.lists", [[1], [2, 3]])
    writer.add_tensor("t", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    found = {"tensors": 8, "keys": 16}
    for name in ("strings", "numbers", "lists"):
        key = content.index(f"a.{name}".encode()) + len(f"a.{name}")
        found[name] = key + 4 + 4  # the value's type, the elements' type
    found["a list in a list"] = found["lists"] + 8 + 4
    found["a string's length"] = found["strings"] + 8
    name = content.index(struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2)) + 9
    found["a tensor's dimension"] = name + 4
    found["a tensor's offset"] = name + 4 + 16 + 4
    return content, found


PLACES = [
    *("tensors", "keys", "strings", "numbers", "lists", "a list in a list", "a string's length"),
    *("a tensor's dimension", "a tensor's offset"),
]


@pytest.mark.parametrize("count", [2**20, 2**31, 2**40, 2**62, 2**64 - 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_count_is_held_against_the_file_before_anything_is_made(parts, tmp_path, place, count):
    content, places = parts
    where = places[place]
    path = tmp_path / "x.gguf"
    path.write_bytes(content[:where] + struct.pack("<Q", count) + content[where + 8 :])
    before, started = Process().memory_info().rss, time.process_time()
    for load in (lorax.load_model, lorax.load_tokenizer):
        with pytest.raises(LoraxError):
            load(path)
    assert time.process_time() - started < 2
    assert Process().memory_info().rss - before < MAX_MEGABYTES * 2**20
