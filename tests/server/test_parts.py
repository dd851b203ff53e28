"""Stop words and the queue by themselves."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_tokenizer

from lorax.inference.batch import Row, draw
from lorax.inference.server.answer import Answer, StopWords
from lorax.inference.server.queue import FairQueue

WORDS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def naive(text, words):
    """The text before the first character at which a stop word is complete; and whether one is."""
    for end in range(len(text) + 1):
        places = [text[:end].find(word) for word in words if word in text[:end]]
        if places:
            return text[: min(places)], True
    return text, False


@given(st.lists(st.text("abc", max_size=1), max_size=30), WORDS)
def test_text_passes_until_the_first_stop_word(pieces, words):
    stops, given_so_far = StopWords(words), ""
    for piece in pieces:
        given_so_far += stops.add(piece)
        if stops.found:
            break
        assert not any(word in given_so_far for word in words)
    given_so_far += stops.held
    assert (given_so_far, stops.found) == naive("".join(pieces), words)


@given(st.lists(st.text("abc", max_size=5), max_size=10), WORDS)
def test_however_it_is_cut_no_stop_word_is_given(pieces, words):
    stops = StopWords(words)
    found = "".join(stops.add(piece) for piece in pieces if not stops.found) + stops.held
    assert "".join(pieces).startswith(found)
    assert not any(word in found for word in words)


@given(
    st.floats(min_value=0, max_value=1e-30, exclude_min=True),
    st.floats(min_value=0, max_value=1, exclude_min=True),
    st.permutations([-2e30, -3.0, 0.0, 2.5, 2e30]),
)
def test_no_temperature_and_no_top_p_is_too_small_to_draw(temperature, top_p, logits):
    assert draw(torch.tensor(logits), temperature, top_p, None) == logits.index(2e30)
    assert draw(torch.tensor(logits[:1]), 1.0, temperature, None) == 0


def answer(adapter):
    return Answer(Row([1], 1, adapter=adapter), byte_tokenizer(), print, 0.0)


def test_the_turn_is_that_of_who_has_least():
    queue, running = FairQueue(), []
    for adapter in ["a", "a", "a", None, "b", "a"]:
        queue.add(answer(adapter))
    while queue:
        following = queue.first(running)
        queue.remove(following)
        running.append(following.row.adapter)
    assert running == ["a", None, "b", "a", "a", "a"]


def test_who_leaves_the_queue_is_not_missed():
    queue, all_of_them = FairQueue(), [answer(name) for name in ("a", "a", "b", "a")]
    for one in all_of_them:
        queue.add(one)
    queue.remove(all_of_them[1])
    queue.remove(all_of_them[2])
    assert queue.all() == [all_of_them[0], all_of_them[3]]
    assert queue.first([]) is all_of_them[0]
