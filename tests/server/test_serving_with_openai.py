"""The official client against `lorax serve`: each answer is the one that `lorax.generate` gives."""

import openai
import pytest
from serving import ADAPTERS, make_directories, serving

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
    """generate(prompt, adapter, ...) of the library, on a model of its own."""
    model = lorax.load_model(folder / "base")
    tokenizer = lorax.load_tokenizer(folder / "base")
    for name in ADAPTERS:
        lorax.load_adapter(model, folder / "adapters" / name, name=name)

    def generate(prompt, adapter=None, **options):
        with lorax.use_adapter(model, adapter):
            return lorax.generate(model, tokenizer, prompt, **options)

    generate.tokenizer = tokenizer
    return generate


def connected(service, key="none", **options):
    return openai.OpenAI(
        base_url=f"{service.address}/v1", api_key=key, max_retries=0, timeout=30, **options
    )


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


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError, match="nobody") as raised:
        client.completions.create(model="nobody", prompt="x")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.completions.create(model="dora", prompt="x", n=2)
