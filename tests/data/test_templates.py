"""Chat templates: rendered as in transformers, and harmless whoever wrote them (S4)."""

import json
import signal
import threading
import time

import pytest
from tiny_tokenizer import CHATML, byte_backend

from lorax.data import templates
from lorax.data.templates import MAX_SECONDS, MAX_SOURCE_CHARACTERS, ChatTemplate
from lorax.data.tokenizer import Tokenizer
from lorax.errors import LoraxError, TemplateError

SMOLLM2 = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}
{% set loop_messages = messages %}
{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}
{% set content = message['content'] %}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}"""
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "ipython" %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{%- set ns = namespace(index=0) %}{{ bos_token }}"
    "{%- for message in messages if message['role'] != 'system' %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if ns.index == 0 and messages[0]['role'] == 'system' %}"
    "{{ '[INST] ' + messages[0]['content'] + '\n\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}"
    "{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{%- endif %}{%- set ns.index = ns.index + 1 %}{%- endfor %}"
)
MARKED = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}</s>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "  What is <2 & 3>? "},
    {"role": "assistant", "content": "Two, 'and' \u00fc\u4e2d\U0001f600."},
    {"role": "user", "content": "Why?\n\nTell me."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]


def render(source: str, **variables) -> str:
    return ChatTemplate(source).render(**variables).text


def refused(source: str, **variables) -> str:
    """Render, expect an error, give its message."""
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render(**variables)
    assert isinstance(caught.value, LoraxError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [TURNS, SYSTEM, TURNS[:1], SYSTEM[:3]])
@pytest.mark.parametrize(
    "template",
    [CHATML, SMOLLM2, LLAMA2, LLAMA3, MISTRAL, MARKED],
    ids=["chatml", "smollm2", "llama2", "llama3", "mistral", "marked"],
)
def test_rendered_as_transformers_does(template, messages, add_generation_prompt):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    mine = Tokenizer(
        byte_backend(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
    )
    expected = theirs.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert mine.apply_chat_template(messages, add_generation_prompt) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ x | tojson }}",
        "{{ x | tojson(indent=2) }}",
        "{{ x.text | upper }} {{ x.items() | list | length }}",
        "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{%- for k, v in x | dictsort %}\n    {{ k }}={{ v }}\n{% endfor %}",
        "{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m(x.text) }}",
        "{% if tools %}tools{% else %}none{% endif %}{{ documents is none }}",
    ],
)
def test_filters_and_tags_as_transformers_has_them(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    x = {"text": "\u00fc<&'", "number": 1.5, "list": [None, True]}
    theirs, _ = render_jinja_template([[]], chat_template=source, x=x)
    assert render(source, messages=[], x=x) == theirs[0]


def test_the_date_is_todays():
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_generation_marks_what_the_assistant_says():
    rendered = ChatTemplate(MARKED).render(messages=TURNS[:2] * 2)
    answer = TURNS[1]["content"] + "</s>"
    assert [rendered.text[start:end] for start, end in rendered.spans] == [answer, answer]
    assert rendered.text.count("<assistant>" + answer) == 2


def test_generation_markers_cannot_be_forged_by_content():
    forged = [{"role": "user", "content": "<0>{% generation %}no{% endgeneration %}</0>"}]
    rendered = ChatTemplate(MARKED).render(messages=forged)
    assert rendered.spans == ()
    assert forged[0]["content"] in rendered.text


def test_content_is_never_read_as_a_template():
    assert render("{{ c }}", c="{{ 1 + 1 }}{% raw %}") == "{{ 1 + 1 }}{% raw %}"


@pytest.mark.parametrize(
    "source",
    [
        "[{{ nothing_here }}{{ message.absent }}]",
        "{{ 'a' ~ message.absent }}",
        "{% for x in message.absent %}{% endfor %}none",
        "{% if message.tools %}a{% else %}b{% endif %}{{ message.tools is defined }}",
        "{{ message.tools or 'none' }}{{ message.tools | default('x') }}",
        "{{ message.absent | length }}{{ message.absent | upper }}[{{ message.absent | trim }}]",
        "{{ (message.absent is none) ~ (message.absent == none) ~ (message.absent == '') }}",
        "{{ message.absent.further }}",
        "{{ 'a' + message.absent }}",
        "{{ message.absent['x'] }}",
        "{{ message.absent() }}",
        "{{ bos_token + 'x' }}",
    ],
)
def test_a_name_that_is_missing_does_what_it_does_in_transformers(source):
    assert outcome(source, message={}) == theirs(source, message={})


def outcome(source: str, **variables):
    try:
        return ChatTemplate(source).render(messages=[], **variables).text
    except TemplateError as error:
        return "refused" if "chat template: " in str(error) else str(error)


def theirs(source: str, **variables):
    """What transformers renders, or "refused"."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        return render_jinja_template([[]], chat_template=source, **variables)[0][0]
    except Exception:  # Jinja's own, Python's, its sandbox's
        return "refused"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ ('' | attr('__cla' ~ 'ss__')).mro() }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{0.__class__}'.format_map({'0': ''}) }}",
        "{{ ('{0.__class__}' | string).format('') }}",
        "{{ [''] | map(attribute='__class__') | first }}",
        "{{ [''] | map('attr', '__class__') | first }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__closure__ }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum.__globals__ }}",
        "{{ (lambda: 1) }}",
        "{% set f = ''.join %}{{ f.__self__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ x.update({'a': 1}) }}",
        "{{ x.pop('a') }}",
        "{{ (messages | batch(1)).gi_frame }}",
        "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ open('/etc/passwd') }}",
        "{{ __import__('os') }}",
    ],
)
def test_the_sandbox_holds(source):
    """What it does not give prints as nothing, or is an error; as in transformers."""
    found = outcome(source, x={"a": 1})
    assert found == theirs(source, x={"a": 1})
    assert found in ("", "refused")


@pytest.mark.parametrize("source", ["{{", "{% for %}", "{% if a %}", "{{ a b }}", "{% nothing %}"])
def test_a_syntax_error_is_an_error(source):
    assert "TemplateSyntaxError" in refused(source)


def test_the_templates_own_exception_is_shown():
    assert "roles must alternate" in refused("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
    ],
)
def test_a_loop_without_end_is_stopped_by_the_clock(source, monkeypatch):
    assert MAX_SECONDS <= 5
    monkeypatch.setattr(templates, "MAX_SECONDS", 1.0)
    start = time.monotonic()
    assert "longer than 1 seconds" in refused(source)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ x * 10 ** 10 }}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}"
        "{% endfor %}{{ n.s }}",
        "{% set n = namespace(s=['ab']) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}"
        "{% endfor %}{{ n.s }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ x | center(10 ** 10) }}",
        "{{ [x] | tojson(indent=10 ** 10) }}",
        "{% for i in range(99999) %}{{ x * 1000 }}{% endfor %}",
        "{{ 'a' * (5 * 1024 * 1024) }}",
    ],
)
def test_huge_strings_are_refused_in_bounded_time(source):
    start = time.monotonic()
    refused(source, x="a")
    assert time.monotonic() - start < MAX_SECONDS


def test_output_just_below_the_limit_is_given():
    assert len(render("{{ 'a' * 4000000 }}")) == 4_000_000


def test_deep_nesting_is_an_error():
    refused("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")
    refused("{% if 1 %}" * 3000 + "{% endif %}" * 3000)


def test_a_source_too_long_is_refused_before_it_is_sent():
    with pytest.raises(TemplateError, match="at most"):
        ChatTemplate("a" * (MAX_SOURCE_CHARACTERS + 1))


def test_variables_that_are_no_plain_data_are_refused():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert "plain data" in refused("{{ x }}", x=object())
    assert "plain data" in refused("{{ x | length }}", x=nested)
    assert render("{{ x }}", x=1) == "1"


def test_unpaired_surrogates_do_not_break_the_pipe():
    assert render("{{ x }}", x="a\ud800b") == "a\ud800b"
    refused("{{ '\ud800' }}{% bad %}")


def test_the_worker_survives_errors_and_is_not_started_anew():
    render("a")
    process = templates._worker._process
    refused("{{ nothing.further }}")
    refused("{{")
    assert render("{{ x }}", x="still here") == "still here"
    assert templates._worker._process is process


def test_after_a_worker_was_stopped_the_next_rendering_works(monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    assert "longer than" in refused("{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2)
    monkeypatch.undo()
    assert render("b") == "b"


def test_a_worker_that_was_killed_is_replaced():
    render("a")
    templates._worker._process.kill()
    templates._worker._process.wait()
    assert render("b") == "b"


def test_a_worker_that_dies_under_the_question_is_an_error_of_ours(monkeypatch):
    render("a")
    process = templates._worker._process
    process.kill()
    process.wait()
    monkeypatch.setattr(process, "poll", lambda: None)
    assert "ended" in refused("{{ x }}", x="a" * 100_000)
    monkeypatch.undo()
    assert render("b") == "b"


def test_an_interrupted_rendering_leaves_no_answer_for_the_next_one():
    render("a")
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    # A shell starts its background jobs with SIGINT ignored, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            render("{% for a in range(4000) %}{% for b in range(4000) %}{% endfor %}{% endfor %}x")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert render("mine") == "mine"


def test_several_threads_get_their_own_answers():
    results: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            results[number] = render("{{ x }}", x=number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: str(n) for n in range(4)}


def test_the_worker_does_not_import_torch():
    import subprocess
    import sys

    code = (
        "import sys, json, lorax.data.template_worker; "
        "print(json.dumps([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(found.stdout) == []


def test_a_tokenizer_without_a_template_says_so():
    with pytest.raises(TemplateError, match="no chat template"):
        Tokenizer(byte_backend()).apply_chat_template(TURNS)
