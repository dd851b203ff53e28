"""The official client against `lorax serve`: each answer is the one that `lorax.generate` gives."""

import httpx2
import openai
import pytest
import torch
from served import ADAPTERS, connected, make_directories, oracle_of, serving

import lorax

NAMES = [None, *ADAPTERS]
PROMPT = "Once upon a time"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_directories(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def service(folder):
    with serving(folder) as found:
        yield found


@pytest.fixture(scope="module")
def client(service):
    with connected(service) as found:
        yield found


@pytest.fixture(scope="module")
def oracle(folder):
    return oracle_of(folder)


def base_of(client):
    return client.models.list().data[0].id


def rendered(oracle, messages=CHAT):
    return oracle.tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_models_are_the_base_and_its_adapters(client, folder):
    found = client.models.list().data
    assert [one.id for one in found] == [str(folder / "base"), *sorted(ADAPTERS)]
    assert client.models.retrieve("dora").id == "dora"
    assert client.models.retrieve("base").id == str(folder / "base")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_is_what_generate_gives(client, oracle, name):
    expected = oracle(PROMPT, name, max_new_tokens=24)
    found = client.completions.create(
        model=name or base_of(client), prompt=PROMPT, max_tokens=24, temperature=0
    )
    assert found.choices[0].text == expected
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage.prompt_tokens == len(PROMPT)
    assert found.usage.total_tokens == len(PROMPT) + found.usage.completion_tokens


@pytest.mark.parametrize("name", NAMES)
def test_so_is_a_chat_and_its_stream(client, oracle, name):
    expected = oracle(rendered(oracle), name, max_new_tokens=24, temperature=0.8, top_p=0.9, seed=3)
    how = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "max_completion_tokens": 24}
    asked = {"model": name or base_of(client), "messages": CHAT, **how}
    found = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == expected
    assert found.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *chunks, last = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert [c.choices[0].finish_reason for c in chunks][-1] == found.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == found.usage


def test_several_prompts_as_text_or_tokens(client, oracle):
    texts = [PROMPT, "b", "There was"]
    expected = [oracle(text, "plain", max_new_tokens=9) for text in texts]
    for prompts in (texts, [oracle.tokenizer.encode(text) for text in texts]):
        found = client.completions.create(
            model="plain", prompt=prompts, max_tokens=9, temperature=0, user="me"
        )
        assert [one.text for one in found.choices] == expected
        assert found.usage.prompt_tokens == sum(map(len, texts))
    alone = client.completions.create(
        model="plain", prompt=oracle.tokenizer.encode(PROMPT), max_tokens=9, temperature=0
    )
    assert alone.choices[0].text == expected[0]


def test_an_answer_ends_before_its_stop_word(client, oracle):
    whole = oracle(PROMPT, "rslora", max_new_tokens=40)
    word = whole[7:10]
    cut = whole[: whole.index(word)]
    how = {"model": "rslora", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    for stop in (word, ["not there", word, whole[20:22] + "\0"]):
        found = client.completions.create(**how, stop=stop)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (cut, "stop")
        chunks = list(client.completions.create(**how, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == cut
        assert chunks[-1].choices[0].finish_reason == "stop"
    held = client.completions.create(**how, stop=whole[-1] + "\0")
    assert held.choices[0].text == whole


def test_logprobs_are_the_models(client, folder, oracle):
    prompt = rendered(oracle)
    found = client.chat.completions.create(
        model=base_of(client), messages=CHAT, max_tokens=6, temperature=0, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    model = lorax.load_model(folder / "base")
    ids = oracle.tokenizer.encode(prompt, add_special_tokens=False)
    content = found.choices[0].logprobs.content
    assert len(content) == 6 == found.usage.completion_tokens
    for one in content:
        with torch.no_grad():
            values, tokens = model(torch.tensor([ids]))[0, -1].log_softmax(-1).topk(3)
        assert [t.logprob for t in one.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert one.logprob == one.top_logprobs[0].logprob
        assert one.token == oracle.tokenizer.decode([int(tokens[0])])
        ids.append(int(tokens[0]))
    old = client.completions.create(
        model=base_of(client), prompt=prompt, max_tokens=6, temperature=0, logprobs=3
    )
    assert old.choices[0].logprobs.token_logprobs == [one.logprob for one in content]
    chunks = list(client.completions.create(
        model=base_of(client), prompt=prompt, max_tokens=6, temperature=0, logprobs=3, stream=True,
    ))  # fmt: skip
    told = [value for c in chunks for value in c.choices[0].logprobs.token_logprobs]
    assert told == [one.logprob for one in content]


def test_an_end_token_ends_unless_it_is_ignored(folder):
    """With every token an end token, the first one ends the answer."""
    with serving(folder, adapters=None) as service, connected(service) as client:
        base = service.models.base
        base.tokenizer.end_token_ids = tuple(range(261))
        how = {"model": "base", "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
        found = client.completions.create(**how)
        assert (found.choices[0].text, found.choices[0].finish_reason) == ("", "stop")
        assert found.usage.completion_tokens == 1
        found = client.completions.create(**how, extra_body={"ignore_eos": True})
        assert found.choices[0].finish_reason == "length"
        assert found.usage.completion_tokens == 5


def post(client, path, **body):
    return client.post(path, body=body, cast_to=str)


def test_adapters_come_and_go_at_run_time(client, folder, oracle):
    how = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    post(client, "/load_lora_adapter", lora_name="late", lora_path="dora")
    assert client.models.list().data[-1].id == "late"
    assert client.completions.create(model="late", **how).choices[0].text == oracle(
        PROMPT, "dora", max_new_tokens=16
    )
    with pytest.raises(openai.BadRequestError, match="already been loaded"):
        post(client, "/load_lora_adapter", lora_name="late", lora_path="plain")
    where = str(folder / "adapters" / "plain")
    post(client, "/load_lora_adapter", lora_name="late", lora_path=where, load_inplace=True)
    assert client.completions.create(model="late", **how).choices[0].text == oracle(
        PROMPT, "plain", max_new_tokens=16
    )
    post(client, "/unload_lora_adapter", lora_name="late")
    for missing in (
        lambda: client.completions.create(model="late", **how),
        lambda: post(client, "/unload_lora_adapter", lora_name="late"),
        lambda: post(client, "/unload_lora_adapter", lora_name="base"),
    ):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            missing()
    assert len(client.models.list().data) == 1 + len(ADAPTERS)


def test_an_adapter_that_is_unloaded_ends_its_answers_first(folder, oracle):
    expected = oracle(PROMPT, "plain", max_new_tokens=200)
    with serving(folder) as service, connected(service) as client:
        stream = client.completions.create(
            model="plain", prompt=PROMPT, max_tokens=200, temperature=0, stream=True
        )
        text = next(stream).choices[0].text
        post(client, "/unload_lora_adapter", lora_name="plain")
        other = client.completions.create(model="dora", prompt="x", max_tokens=4, temperature=0)
        assert other.choices[0].text == oracle("x", "dora", max_new_tokens=4)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
        client.models.list()
        service.engine.call(lambda: None).result()
        assert [name for name in service.engine.adapters.names if "plain" in name] == []


REFUSED = [
    ({"n": 2}, "n is not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
    ({"temperature": 2.5}, "Invalid 'temperature'"),
    ({"top_p": 0}, "Invalid 'top_p'"),
    ({"max_tokens": 0}, "Invalid 'max_tokens'"),
    ({"max_tokens": 300}, "maximum context length is 256"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "up to 4"),
    ({"stop": ""}, "up to 4"),
    ({"seed": 2**64}, "Invalid 'seed'"),
    ({"extra_body": {"tempreature": 1}}, "Unknown parameter: 'tempreature'"),
    ({"messages": []}, "Invalid 'messages'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "Invalid 'messages.0.role'"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, "maximum context length is 256"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"top_logprobs": 2}, "logprobs to be true"),
]


@pytest.mark.parametrize(("wrong", "words"), REFUSED)
def test_what_cannot_be_done_is_refused_in_openais_form(client, wrong, words):
    with pytest.raises(openai.BadRequestError, match=words) as raised:
        client.chat.completions.create(**{"model": "dora", "messages": CHAT, **wrong})
    assert raised.value.type == "invalid_request_error"


def test_what_says_nothing_about_the_answer_is_passed_over(client):
    found = client.chat.completions.create(
        model="plain", messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        max_tokens=2, n=1, presence_penalty=0, logit_bias={}, user="me", metadata={"a": "b"},
        response_format={"type": "text"}, store=False, temperature=1e-300,
    )  # fmt: skip
    assert found.usage.completion_tokens == 2


def test_the_key_is_asked_for(folder):
    with serving(folder, adapters=None, api_key="secret") as service:
        with connected(service, "secret") as client:
            assert client.models.list().data
            assert client.get("/../health", cast_to=object) == {"status": "ok"}
        for wrong in ("Secret", "secret2", "secre"):
            with connected(service, wrong) as client, pytest.raises(openai.AuthenticationError):
                client.models.list()
        for wrong in (b"Bearer s\xe9cret", b"secret", b""):
            found = httpx2.get(f"{service.address}/v1/models", headers={b"authorization": wrong})
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"


def test_metrics_count(client):
    lines = client.get("/../metrics", cast_to=str).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(values["lorax_adapters"]) == len(ADAPTERS)
    assert int(values["lorax_answers_total"]) > 0
    assert int(values["lorax_tokens_total"]) > int(values["lorax_answers_total"])
    assert int(values["lorax_running"]) == int(values["lorax_waiting"]) == 0
    assert int(values['lorax_requests_total{path="/v1/completions",status="200"}']) > 0
