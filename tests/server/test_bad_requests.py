"""What no client should send: 4xx in OpenAI's form or a closed stream, and the server lives."""

import json
import os
import random
import socket
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from served import make_directories, serving

from lorax.inference.server.limits import Limits

ADAPTERS = {"plain": {"r": 4, "target_modules": "all-linear"}}
LIMITS = Limits(slots=4, context_tokens=256, body_bytes=20_000, patience_seconds=1.0)
CHAT = {
    "model": "plain",
    "messages": [{"role": "user", "content": "Who are you?"}],
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "max_tokens": 3,
    "stop": ["\n"],
    "logprobs": True,
    "top_logprobs": 2,
    "stream": False,
}
COMPLETION = {"model": "base", "prompt": "Once", "max_tokens": 3, "logprobs": 1, "stop": None}
LOAD = {"lora_name": "late", "lora_path": "plain", "load_inplace": True}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/load_lora_adapter": LOAD,
    "/v1/unload_lora_adapter": {"lora_name": "late"},
}
STRANGE = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, 1e-308, -0.0, 0.5,
    "", "x", "\ud800", "\0", "../plain", "x" * 3000, "<|im_end|>", [], [[]], {}, {"type": "text"},
    ["a", 1], [1, "a"], [300], [-1], [0] * 300, {"role": "user"}, [{"role": "user"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image_url"}]}],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_directories(tmp_path_factory.mktemp("bad"), ADAPTERS)


@pytest.fixture(scope="module")
def service(folder):
    with serving(folder, LIMITS) as found:
        found.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections
        yield found


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service.address, timeout=30) as found:
        yield found
        lives(found)


def lives(client):
    found = client.post("/v1/completions", json={"model": "plain", "prompt": "x", "max_tokens": 2})
    assert found.status_code == 200
    assert found.json()["usage"]["completion_tokens"] in (1, 2)
    assert client.get("/health").status_code == 200


def is_refusal(response, *statuses):
    assert response.status_code in statuses or (not statuses and 400 <= response.status_code < 500)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return True


def asked(client, path, body):
    """In ASCII, as half of a surrogate pair has no UTF-8."""
    headers = {"content-type": "application/json"}
    return client.post(path, content=json.dumps(body), headers=headers)


def mutated(body, draw):
    """A body with something else in one or two of its places, or as no JSON at all."""
    body = json.loads(json.dumps(body))
    for _ in range(draw.randint(1, 2)):
        place, key = body, draw.choice(list(body) or ["none"])
        while isinstance(place.get(key), dict) and draw.random() < 0.5:
            place, key = place[key], draw.choice(list(place[key]) or ["none"])
        kind = draw.random()
        if kind < 0.1:
            place.pop(key, None)
        elif kind < 0.2:
            place[draw.choice(["n", "echo", "tools", "best_of", "what"])] = draw.choice(STRANGE)
        elif kind < 0.4 and isinstance(place.get(key), list) and place[key]:
            place[key][0] = draw.choice(STRANGE)
        else:
            place[key] = draw.choice(STRANGE)
    text = json.dumps(body).encode()
    if draw.random() < 0.15:
        at = draw.randrange(len(text))
        text = text[:at] + bytes([draw.randrange(256)]) + text[at + draw.randint(0, 2) :]
    return text


def test_mutated_requests(client):
    draw, refused = random.Random(0), 0
    count = int(os.environ.get("LORAX_MUTATIONS", "200"))
    for _ in range(count):
        path = draw.choice(list(PATHS))
        body = mutated(PATHS[path], draw)
        found = client.post(path, content=body, headers={"content-type": "application/json"})
        if found.status_code != 200:
            refused += is_refusal(found)
    assert 0.4 * count < refused < count


RAW = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number that no one writes": b'{"model": "plain", "prompt": "x", "temperature": NaN}',
    "digits": b'{"model": "plain", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "depth": b'{"model": "plain", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "no UTF-8": b'{"model": "plain", "prompt": "\xff\xfe"}',
    "half of a pair": b'{"model": "plain", "prompt": "\\ud800"}',
    "a name with half of a pair": b'{"model": "\\ud800", "prompt": "x"}',
    "a field twice removed": b'{"model": "plain", "prompt": "x", "\\ud800": 1}',
}


@pytest.mark.parametrize("name", RAW)
def test_bodies_that_are_none(client, name):
    headers = {"content-type": "application/json"}
    assert is_refusal(client.post("/v1/completions", content=RAW[name], headers=headers), 400, 404)


def test_a_body_is_bounded_and_json_by_its_type(client):
    big = {"model": "plain", "prompt": "x" * LIMITS.body_bytes}
    assert is_refusal(client.post("/v1/completions", json=big), 413)
    parts = (b"x" * 1000 for _ in range(100))
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=client.base_url) as other:
        try:
            found = other.post("/v1/completions", content=parts, headers=headers)
        except httpx.WriteError:  # it was closed before all of it was sent
            pass
        else:
            assert is_refusal(found, 413)
    for kind in ("text/plain", "multipart/form-data", ""):
        found = client.post("/v1/completions", content=b"{}", headers={"content-type": kind})
        assert is_refusal(found, 415)
    assert is_refusal(client.get("/v1/completions"), 405)
    assert is_refusal(client.post("/v1/embeddings", json={}), 404)


def test_adapters_come_from_the_directory_alone(client, folder, service):
    outside = folder / "elsewhere"
    if not outside.exists():
        outside.mkdir()
        for file in (folder / "adapters" / "plain").iterdir():
            (outside / file.name).write_bytes(file.read_bytes())
        (folder / "adapters" / "link").symlink_to(outside)
    tricks = [
        "../elsewhere", "plain/../../elsewhere", str(outside), "link", "./link/", ".", "", "..",
        "/", "plain\0", "~", "x" * 5000, "\ud800", "nobody", "plain/adapter_config.json",
        "//etc", "file:///etc", "plain/..", str(folder / "adapters" / ".." / "elsewhere"),
    ]  # fmt: skip
    for path in tricks:
        found = asked(client, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
        assert is_refusal(found, 400), path
    for name in ("", "a\nb", "\0", "x" * 300, str(folder / "base"), "plain", "\ud800"):
        found = asked(client, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": "plain"})
        assert is_refusal(found, 400), name
    assert "x" not in [one.name for one in service.models.all()]
    named = {"lora_name": "../up", "lora_path": str(folder / "adapters" / "plain")}
    assert asked(client, "/v1/load_lora_adapter", named).status_code == 200  # a name, no path
    assert client.get("/v1/models/../up").status_code in (200, 404)
    assert asked(client, "/v1/unload_lora_adapter", {"lora_name": "../up"}).status_code == 200


def test_damaged_adapters_are_refused_and_nothing_stays(client, folder, service):
    before = service.engine.adapters.names
    damaged = folder / "adapters" / "damaged"
    damaged.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (folder / "adapters" / "plain" / name).read_bytes()
        (damaged / name).write_bytes(data if name.endswith("json") else data[: len(data) // 2])
    found = client.post(
        "/v1/load_lora_adapter", json={"lora_name": "damaged", "lora_path": "damaged"}
    )
    assert is_refusal(found, 400)
    assert service.engine.adapters.names == before


def sent(service, body, path="/v1/completions", start=None):
    """A socket that has asked."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    found.connect(("127.0.0.1", service.port))
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    found.sendall((head.encode() + data)[:start])
    return found


def quiet(service, seconds=20):
    """Whether, within a while, nobody is answered and nobody connected."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        engine = service.engine
        if not (engine.running or engine.waiting or service.server_state.connections):
            return True
        time.sleep(0.02)
    return False


MUCH = {
    "model": "plain", "prompt": ["x"] * 16, "max_tokens": 250, "logprobs": 5, "ignore_eos": True,
}  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_is_answered_no_further(service, stream):
    assert quiet(service)
    before = service.engine.counts["cancelled"]
    with sent(service, MUCH | {"stream": stream}):
        until = time.monotonic() + 20
        while not service.engine.running and time.monotonic() < until:
            time.sleep(0.005)
    assert quiet(service)
    assert service.engine.counts["cancelled"] > before
    with httpx.Client(base_url=service.address, timeout=30) as client:
        lives(client)


def test_one_that_stops_reading_is_cut_off(service):
    assert quiet(service)
    with sent(service, MUCH | {"stream": True}):
        assert quiet(service, 60)
    with httpx.Client(base_url=service.address, timeout=30) as client:
        lives(client)


@pytest.mark.parametrize("start", [0, 10, -5])
def test_so_is_one_that_stops_sending(service, start):
    assert quiet(service)
    with sent(service, MUCH, start=start) as connection:
        connection.settimeout(20)
        try:
            answer = connection.recv(1000)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
        assert quiet(service)


def test_no_thread_or_file_is_left_behind(folder):
    def files():
        return len(list(Path("/proc/self/fd").iterdir()))

    with serving(folder, LIMITS):
        pass
    before = files()
    for _ in range(3):
        with serving(folder, LIMITS) as service, httpx.Client(base_url=service.address) as client:
            lives(client)
    assert files() <= before + 2
