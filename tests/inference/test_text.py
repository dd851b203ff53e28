"""Text of tokens while they are being made: whole characters, and nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_tokenizer

from lorax.inference.text import as_text

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("text", ["", "plain", "é", "🚤 and 東京", "a\n\tb", "e\u0301"])
def test_each_piece_is_whole_characters(text):
    ids = TOKENIZER.encode(text)
    pieces = list(as_text(iter(ids), TOKENIZER))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text) + 1  # and what is left behind the last


def test_half_a_character_at_the_end_is_given_at_the_end():
    ids = TOKENIZER.encode("aé")[:-1]
    assert list(as_text(ids, TOKENIZER)) == ["a", "\ufffd"]


def test_a_piece_comes_before_the_next_token_is_asked_for():
    asked = []

    def tokens():
        for token in TOKENIZER.encode("abc"):
            asked.append(token)
            yield token

    pieces = as_text(tokens(), TOKENIZER)
    assert (next(pieces), len(asked)) == ("a", 1)
    assert (next(pieces), len(asked)) == ("b", 2)


@given(st.lists(st.integers(0, 260), max_size=30))
def test_together_they_are_the_text_of_all_tokens(ids):
    assert "".join(as_text(ids, TOKENIZER)) == TOKENIZER.decode(ids, skip_special_tokens=True)
