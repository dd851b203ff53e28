"""Where the answers stand, for templates shaped like those in use; the oracle is transformers.

What generation is given is transformers' rendering of the messages before an answer with its
generation prompt; what is trained must stand right behind it and end with the end token.
"""

import json
import sys

import pytest
from tiny_tokenizer import byte_backend, byte_tokenizer, said

from lorax.data.answers import find_answers
from lorax.data.conversation import Conversation
from lorax.data.examples import chat_segments, encode
from lorax.errors import TemplateError

USER, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "first"}
TALK = [USER, ANSWER, {"role": "user", "content": "two?"}, {"role": "assistant", "content": "last"}]
SYSTEM = {"role": "system", "content": "be brief"}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Trims, and opens the next answer whether asked or not.
ALWAYS_OPEN = (
    "{% for m in messages %}{% set c = '<h>' + m['role'] + '</h>\n\n' + m['content'] | trim + "
    "'<|im_end|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}"
    "{% endfor %}{{ '<h>assistant</h>\n\n' }}"
)
# Another token behind the whole, unless the next answer is asked for.
CLOSED = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)
# Thinks in the last answer only; reads reasoning from its own key or from the text.
THINKS_LAST = """{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}
    {%- set thought = '' %}
    {%- if m.reasoning_content is string %}
        {%- set thought = m.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n') %}
        {%- set thought = thought.split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.last %}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
    {{- content.lstrip('\\n') }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
        {{- '<|im_start|>user' }}
    {%- endif %}
    {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- else %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Drops what was thought, and asks for thinking.
DROPS_THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}<A>{{ c }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
# The answer gets spaces of the template's, and the system text goes into the first question.
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
    "(system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + CHATML.removeprefix("{% for m in messages %}")
)
# No header of roles at all: words, as base models are tuned with.
PLAIN_WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}### Human: {{ m.content }}\n"
    "{% else %}### Assistant: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant: {% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
JSON = (
    "{% for m in messages %}{{ {'role': m.role, 'text': m.content} | tojson }}<|im_end|>"
    "{% endfor %}"
)


def tokenizer(template, eos="<|im_end|>"):
    return byte_tokenizer(bos=True, eos=eos, chat_template=template)


def reference(template, eos="<|im_end|>"):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(bos=True), bos_token="<s>", eos_token=eos,
        chat_template=template,
    )  # fmt: skip


def trained(messages, template, eos="<|im_end|>"):
    mine = tokenizer(template, eos)
    return said(encode(chat_segments(messages, mine), mine), mine)


SHAPES = {
    "chatml": (CHATML, ["first<|im_end|>", "last<|im_end|>"]),
    "always open": (ALWAYS_OPEN, ["first<|im_end|>", "last<|im_end|>"]),
    "closed": (CLOSED, ["first<|im_end|>", "last<|im_end|>"]),
    "thinks last": (THINKS_LAST, ["first<|im_end|>", "<think>\n\n</think>\n\nlast<|im_end|>"]),
    "drops thinking": (DROPS_THINKING, ["first<|im_end|>", "last<|im_end|>"]),
    "brackets": (BRACKETS, [" first <|im_end|>", " last <|im_end|>"]),
    "default system": (DEFAULT_SYSTEM, ["first<|im_end|>", "last<|im_end|>"]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_answers_of_two_rounds(name):
    template, expected = SHAPES[name]
    assert trained(TALK, template) == expected


@pytest.mark.parametrize("name", SHAPES)
def test_the_conversation_is_transformers(name):
    template = SHAPES[name][0]
    mine = tokenizer(template)
    text = reference(template).apply_chat_template(TALK, tokenize=False)
    assert find_answers(Conversation(TALK, [False, True] * 2), mine)[0] == text
    ids = reference(template).apply_chat_template(TALK, return_dict=False)
    assert encode(chat_segments(TALK, mine), mine).ids == ids


@pytest.mark.parametrize("name", ["chatml", "always open", "thinks last", "brackets", "closed"])
def test_an_answer_stands_behind_what_transformers_gives_to_generation(name):
    template, expected = SHAPES[name]
    prompt = reference(template).apply_chat_template(
        TALK[:-1], tokenize=False, add_generation_prompt=True
    )
    segments = chat_segments(TALK, tokenizer(template))
    last = max(n for n, segment in enumerate(segments) if segment.trained)
    assert "".join(segment.text for segment in segments[:last]) == prompt
    assert segments[last].text.startswith(expected[-1].removesuffix("<|im_end|>"))


@pytest.mark.parametrize("template", [CHATML, ALWAYS_OPEN, CLOSED, THINKS_LAST, DEFAULT_SYSTEM])
def test_a_conversation_may_open_with_an_answer(template):
    found = trained([ANSWER, *TALK], template)
    assert [text.removeprefix("<think>\n\n</think>\n\n") for text in found] == [
        "first<|im_end|>", "first<|im_end|>", "last<|im_end|>",
    ]  # fmt: skip


def test_an_opening_answer_that_thinks_begins_behind_its_header():
    assert trained([ANSWER], THINKS_LAST) == ["<think>\n\n</think>\n\nfirst<|im_end|>"]


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nhm, so\n</think>\n\nstone"},
        {"content": "stone", "reasoning_content": "hm, so"},
        {"content": "stone", "reasoning": "hm, so"},
        {"content": "stone", "thinking": "hm, so"},
    ],
)
def test_the_last_answers_thinking_is_trained_whatever_its_name(answer):
    talk = [*TALK, USER, {"role": "assistant", **answer}]
    text = reference(THINKS_LAST).apply_chat_template(talk, tokenize=False)
    assert tokenizer(THINKS_LAST).apply_chat_template(talk) == text
    assert trained(talk, THINKS_LAST) == [
        "first<|im_end|>", "last<|im_end|>", "<think>\nhm, so\n</think>\n\nstone<|im_end|>",
    ]  # fmt: skip
    assert trained([*talk, USER, ANSWER], THINKS_LAST)[2] == "stone<|im_end|>"


def test_thinking_that_the_template_drops_is_not_missed():
    talk = [USER, {"role": "assistant", "content": "<think>\nhm</think>\n\nstone"}, *TALK]
    assert trained(talk, DROPS_THINKING)[0] == "\n\nstone<|im_end|>"


def test_space_around_an_answer_is_the_templates_to_keep_or_trim():
    talk = [USER, {"role": "assistant", "content": "\n stone \n"}, USER, ANSWER]
    assert trained(talk, CHATML)[0] == "\n stone \n<|im_end|>"
    assert trained(talk, ALWAYS_OPEN)[0] == "stone<|im_end|>"
    assert trained(talk, BRACKETS)[0] == " stone <|im_end|>"


@pytest.mark.parametrize("content", [None, "", "I look."])
def test_calls_of_tools_and_their_answers(content):
    call = {"type": "function", "function": {"name": "times", "arguments": {"a": 3, "b": "x"}}}
    talk = [
        USER,
        {"role": "assistant", "content": content, "tool_calls": [call, call]},
        {"role": "tool", "name": "times", "content": "12"},
        {"role": "tool", "name": "times", "content": "13"},
        {"role": "assistant", "content": "12 and 13"},
    ]
    text = reference(THINKS_LAST).apply_chat_template(talk, tokenize=False)
    mine = tokenizer(THINKS_LAST)
    assert mine.apply_chat_template(talk) == text
    first, last = trained(talk, THINKS_LAST)
    one = '\n<tool_call>\n{"name": "times", "arguments": {"a": 3, "b": "x"}}\n</tool_call>'
    assert first == (content or "") + one * 2 + "<|im_end|>"
    assert last == "<think>\n\n</think>\n\n12 and 13<|im_end|>"


def test_without_an_end_token_an_answer_ends_where_the_next_header_begins():
    segments = chat_segments(TALK, tokenizer(PLAIN_WORDS, eos="</s>"))
    assert [s.text for s in segments if s.trained] == ["first\n", "last\n"]
    open_end = [s.text for s in chat_segments(TALK, tokenizer(ALWAYS_OPEN, "</s>")) if s.trained]
    assert open_end[0].startswith("first<|im_end|>")
    assert "two?" not in open_end[0]


@pytest.mark.parametrize("template", [PARTS, CHATML])
def test_text_parts_as_the_template_takes_them(template):
    talk = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    plain = reference(CHATML).apply_chat_template(TALK, tokenize=False)
    assert "".join(s.text for s in chat_segments(talk, tokenizer(template))) == plain
    assert trained(talk, template) == ["first<|im_end|>", "last<|im_end|>"]


def test_an_answer_inside_json_is_found():
    talk = [USER, {"role": "assistant", "content": 'say "a"\n\u00fc'}, *TALK]
    form = {"role": "assistant", "text": talk[1]["content"]}
    assert trained(talk, JSON)[0] == json.dumps(form, ensure_ascii=False) + "<|im_end|>"


def test_an_empty_answer_is_its_end_token():
    assert trained([USER, {"role": "assistant", "content": ""}], CHATML) == ["<|im_end|>"]


@pytest.mark.parametrize("add", ["", "\n"])
def test_generation_marks_against_transformers(add):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}" + add + "{% endfor %}"
    )
    theirs = reference(template).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    mine = tokenizer(template)
    example = encode(chat_segments(TALK, mine), mine)
    count = len(example.ids)  # what stands behind the last answer is left out
    assert example.ids == theirs["input_ids"][:count]
    assert [int(t) for t in example.trained] == theirs["assistant_masks"][:count]
    assert not any(theirs["assistant_masks"][count:])


def test_words_that_look_like_marks_of_a_template_are_only_words():
    odd = "</think> <think> {% generation %} </s> [/INST] <A>"
    talk = [{"role": "user", "content": odd}, {"role": "assistant", "content": "x" + odd}]
    assert trained(talk, CHATML) == ["x" + odd + "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages if m.role != 'system' %}" + CHATML[24:], r"message 1 \(of system\)"),
        ("{{ messages[-1].content }}", r"leaves out message 1"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "place cannot be found"),
        ("{% for m in messages %}{{ m.content | reverse }}{% endfor %}", "place cannot be found"),
    ],
)  # fmt: skip
def test_a_template_that_hides_a_message_is_refused_by_name(template, words):
    with pytest.raises(TemplateError, match=words):
        chat_segments([SYSTEM, *TALK], tokenizer(template))


def test_tools_that_the_template_does_not_print_are_refused():
    talk = Conversation(TALK, [False, True] * 2, {"tools": [{"name": "times"}]})
    with pytest.raises(TemplateError, match="does not print the row's tools"):
        find_answers(talk, tokenizer(CHATML))


@pytest.mark.parametrize("template", [CHATML, THINKS_LAST, CLOSED, BRACKETS, PLAIN_WORDS])
def test_renderings_do_not_grow_with_the_turns(template, monkeypatch):
    mine = tokenizer(template)
    count = 0
    render = mine.render_chat

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return render(*args, **kwargs)

    monkeypatch.setattr(mine, "render_chat", counted)
    found = {}
    for rounds in (2, 40):
        count = 0
        chat_segments(TALK * rounds, mine)
        found[rounds] = count
    assert found[40] <= found[2] + 1 <= 8


def instructions(work) -> int:
    """How many of Python's instructions lorax executes in it, the same on any machine."""
    count = 0

    def counted(frame, event, _):
        nonlocal count
        count += event == "opcode"
        return counted

    def entered(frame, event, _):
        if not frame.f_globals["__name__"].startswith("lorax."):
            return None
        frame.f_trace_opcodes = True
        return counted

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_the_work_is_linear_in_the_turns():
    mine = tokenizer(CHATML)
    work = {}
    for rounds in (10, 80):
        talk = TALK * rounds
        work[rounds] = instructions(lambda talk=talk: encode(chat_segments(talk, mine), mine))
    assert 6 < work[80] / work[10] < 10  # quadratic would be 64
