"""Many clients at once: no answer is lost, none is another's, and each is what it is alone."""

import os
import random
import threading
import time

import pytest
from served import ADAPTERS, connected, make_directories, oracle_of, serving

from lorax.inference.server.limits import Limits

NAMES = ["base", *ADAPTERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_directories(tmp_path_factory.mktemp("many"))


@pytest.fixture(scope="module")
def cases(folder):
    """[(what is asked, its answer)]: each adapter, greedy and drawn, of different lengths."""
    generate, found = oracle_of(folder), []
    for n, name in enumerate(NAMES * 3):
        prompt, count = "Once upon a time"[: 3 + n], 5 + 3 * n
        how = {"temperature": 0.9, "top_p": 0.8, "seed": n} if n % 2 else {"temperature": 0.0}
        own = None if name == "base" else name
        answer = generate(prompt, own, max_new_tokens=count, **how)
        found.append(({"model": name, "prompt": prompt, "max_tokens": count, **how}, answer))
    return found


class Client(threading.Thread):
    """Asks one thing after the other, streamed or whole; leaves some streams half way."""

    def __init__(self, client, cases, seed, goes_on):
        super().__init__()
        self.client, self.cases, self.goes_on = client, cases, goes_on
        self.draw = random.Random(seed)
        self.answered, self.wrong = 0, []

    def run(self):
        try:
            while self.goes_on(self):
                self.ask()
        except Exception as error:
            self.wrong.append(error)

    def ask(self):
        asked, expected = self.draw.choice(self.cases)
        kind = self.draw.random()
        if kind < 0.1:
            with self.client.completions.create(**asked, stream=True) as stream:
                next(iter(stream))
            return
        if kind < 0.5:
            chunks = self.client.completions.create(**asked, stream=True)
            found = "".join(chunk.choices[0].text for chunk in chunks)
        else:
            found = self.client.completions.create(**asked).choices[0].text
        self.answered += 1
        if found != expected:
            self.wrong.append((asked, expected, found))


def crowd(service, cases, count, goes_on):
    """Clients that have ended; their answers were all right."""
    with connected(service) as client:
        clients = [Client(client, cases, seed, goes_on) for seed in range(count)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
    assert [wrong for one in clients for wrong in one.wrong] == []
    return clients


def settled(service):
    """Whether nobody is answered any more, and every slot is free, within a while."""
    engine, until = service.engine, time.monotonic() + 20
    while engine.running or engine.waiting:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return sorted(engine.batch.free) == list(range(engine.limits.slots))


def together(batch, monkeypatch):
    """The adapters of each round's rows, as they come."""
    found, a_round = [], batch.round
    monkeypatch.setattr(
        batch, "round", lambda: found.append([row.adapter for row in batch.rows]) or a_round()
    )
    return found


def test_sixteen_clients_get_the_answers_they_get_alone(folder, cases, monkeypatch):
    with serving(folder, Limits(slots=5)) as service:
        rounds = together(service.engine.batch, monkeypatch)
        until = time.monotonic() + 20

        def until_ten_wait():
            while service.engine.waiting < 10 and time.monotonic() < until:
                time.sleep(0.01)

        service.engine.call(until_ten_wait)
        clients = crowd(service, cases, 16, lambda one: one.answered < 3)
        assert settled(service)
        assert sum(one.answered for one in clients) == 48
        assert max(map(len, rounds)) == 5
        assert max(len(set(row)) for row in rounds) > 2


def test_more_adapters_than_the_budget_come_back_from_disk(folder, cases):
    with serving(folder, budget=2) as service:
        crowd(service, cases, 4, lambda one: one.answered < 2)
        assert settled(service)
        assert len(service.engine.adapters.in_memory) <= 2


def test_what_is_too_much_waits_no_longer_than_it_may(folder):
    limits = Limits(slots=1, queue=1, request_seconds=0.3, context_tokens=256)
    asked = {"model": "base", "prompt": "x", "max_tokens": 250, "temperature": 0}
    with serving(folder, limits) as service, connected(service) as client:
        held = threading.Event()
        blocked = service.engine.call(held.wait)  # the engine is busy with something else
        found = []

        def ask():
            try:
                found.append(client.completions.create(**asked))
            except Exception as error:
                found.append(error.status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 20
        while len(found) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert found == [429, 429]
        time.sleep(0.35)
        held.set()
        blocked.result()
        for thread in threads:
            thread.join()
        assert found[2:] == [504, 504]
        assert settled(service)


def test_no_adapter_waits_behind_anothers_crowd(folder, monkeypatch):
    limits = Limits(slots=2, context_tokens=256)
    with serving(folder, limits) as service, connected(service) as client:
        admitted, add = [], service.engine.batch.add
        monkeypatch.setattr(
            service.engine.batch, "add", lambda row: admitted.append(row.adapter) or add(row)
        )

        def ask(name):
            client.completions.create(model=name, prompt="x", max_tokens=60, temperature=0)

        held = threading.Event()
        blocked = service.engine.call(held.wait)
        threads = [threading.Thread(target=ask, args=(name,)) for name in ["plain"] * 6 + ["dora"]]
        for thread in threads:
            thread.start()
            until = time.monotonic() + 20
            while service.engine.waiting < threads.index(thread) + 1 and time.monotonic() < until:
                time.sleep(0.005)
        held.set()
        blocked.result()
        for thread in threads:
            thread.join()
        assert len(admitted) == 7
        assert admitted[1].endswith("dora")


@pytest.mark.nightly
def test_sixty_four_clients_for_a_minute(folder, cases):
    seconds = float(os.environ.get("LORAX_SERVING_SECONDS", "60"))
    with serving(folder, Limits(slots=16, queue=64)) as service:
        until = time.monotonic() + seconds
        clients = crowd(service, cases, 64, lambda one: time.monotonic() < until)
        assert settled(service)
        assert all(one.answered for one in clients)


def test_an_adapter_whose_files_went_ends_no_other_s_answers(folder, cases, monkeypatch):
    """One is unloaded; what stands beside it has to be read again and cannot: the engine lives."""
    with serving(folder) as service, connected(service) as client:
        engine, asked = service.engine, {}
        for given, expected in cases[:3]:
            asked[given["model"]] = given, expected
            assert client.completions.create(**given).choices[0].text == expected
        real, failed = engine._stand, []

        def stand(names):
            if not failed:
                failed.append(names)
                raise OSError("no such directory")
            real(names)

        monkeypatch.setattr(engine, "_stand", stand)
        assert service.models.unload("plain")
        given, expected = asked["rslora"]
        assert client.completions.create(**given).choices[0].text == expected
        assert failed
        assert engine.is_alive
