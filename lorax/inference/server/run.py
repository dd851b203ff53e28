"""The server itself: a socket, signals, and clients that stop sending or reading."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorax.errors import EnvironmentProblem
from lorax.formats.huggingface import load_model, load_tokenizer
from lorax.inference.server.adapters import Models
from lorax.inference.server.app import make_app
from lorax.inference.server.engine import Engine
from lorax.inference.server.limits import Limits

_STOPS = (signal.SIGINT, signal.SIGTERM)
_MOST_CONNECTIONS = 1024


def open_engine(
    base: str,
    adapters: Path | None = None,
    limits: Limits | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    budget: int | None = None,
) -> tuple[Engine, Models]:
    """The model in its thread, and the names it has.

    base: directory, Hub id or .gguf. adapters: the directory of adapters. budget: how many of them
    may be in memory at a time.

    Raises:
        All that `load_model` and `load_tokenizer` raise. EnvironmentProblem: no such directory.
    """
    if adapters is not None and not adapters.is_dir():
        raise EnvironmentProblem(f"--adapters {adapters}: no directory; expected one of adapters")
    quantization = None if quantization == "none" else quantization
    tokenizer = load_tokenizer(base)
    engine = Engine(load_model(base, dtype, device, quantization), limits or Limits(), budget)
    models = Models(engine, base, tokenizer, adapters)
    models.load_all()
    return engine, models


class Service(uvicorn.Server):
    """The server over an engine, which it closes at its end.

    host, port: where it listens; port 0 takes a free one. say: is told the address once it does.

    Raises:
        EnvironmentProblem: it cannot listen there.
    """

    def __init__(
        self,
        engine: Engine,
        models: Models,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        say: Callable[[str], None] = lambda address: None,
    ):
        self.engine, self.models, self.say = engine, models, say
        self.socket = _listening(host, port)
        address, self.port = self.socket.getsockname()[:2]
        self.address = f"http://{f'[{address}]' if ':' in address else address}:{self.port}"
        protocol: Any = partial(Patient, patience_seconds=engine.limits.patience_seconds)
        config = uvicorn.Config(
            make_app(engine, models, api_key),
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(engine.limits.drain_seconds)),
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.say(self.address)

    def serve_until_told(self) -> None:
        """Answer until SIGTERM or SIGINT, then end what is under way.

        Raises:
            KeyboardInterrupt: it was SIGINT.
        """
        try:
            self.run(sockets=[self.socket])
        finally:
            self.engine.close()
        if signal.SIGINT in self._captured_signals:
            raise KeyboardInterrupt

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's, but that the signal does not end the process: it has done as told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Patient(H11Protocol):
    """A connection that is cut when its client takes too long to send a request's head, or to read.

    Without the second, what waits to be read would keep the connection, and its memory, for ever.
    """

    def __init__(self, *given: Any, patience_seconds: float, **named: Any):
        super().__init__(*given, **named)
        self.patience_seconds = patience_seconds
        self._cuts: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: Any) -> None:
        """asyncio's: a new client."""
        super().connection_made(transport)
        self._cut_later("head")

    def handle_events(self) -> None:
        """uvicorn's: bytes came."""
        super().handle_events()
        if self.cycle is not None:
            self._keep("head")

    def pause_writing(self) -> None:
        """asyncio's: too much waits to be read."""
        super().pause_writing()
        self._cut_later("reading")

    def resume_writing(self) -> None:
        """asyncio's: it was read."""
        super().resume_writing()
        self._keep("reading")

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: the end."""
        for why in list(self._cuts):
            self._keep(why)
        super().connection_lost(exc)

    def _cut_later(self, why: str) -> None:
        self._cuts[why] = self.loop.call_later(self.patience_seconds, self.transport.abort)

    def _keep(self, why: str) -> None:
        if why in self._cuts:
            self._cuts.pop(why).cancel()


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise EnvironmentProblem(
            f"cannot listen on {host}, port {port}: {error}; give another --host or --port"
        ) from None
    return found
