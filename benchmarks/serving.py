"""`lorax serve` with SmolLM2-135M on a CPU: eight clients against one, and transformers' server.

    python benchmarks/serving.py                    lorax; with transformers[serving] that, too
    python benchmarks/serving.py --rounds 1 --tokens 16

A round asks each server the same eight prompts, first one after the other, then all at once, for
64 new tokens each (--tokens), the likeliest each time. lorax is told to go on behind an end token;
transformers' server knows no such thing, so its tokens are counted as it says in `usage`. Tokens a
second are all tokens made over the time from the first question to the last answer. The servers
are asked in turn; where other programs run beside them, the ratios say more than the numbers.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import sides
from generation import prepare

import lorax
from lorax.demo import smollm2_path
from lorax.formats.tokenizer_files import write_tokenizer

NAME = "serving-cpu"
CLIENTS = 8
SECONDS_TO_START = 300.0
SUBJECTS = ("rain", "trains", "bread", "the sea", "a clock", "bees", "snow", "paper")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str]):
        self.port = free_port()
        self.process = subprocess.Popen([*command, "--port", str(self.port)])
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=600)

    def is_ready(self) -> bool:
        until = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return self.client.get("/health").status_code == 200
            except httpx2.TransportError:
                time.sleep(0.5)
        return False

    def ask(self, subject: str, tokens: int, **more: Any) -> int:
        """Tokens made; more: the model's name, and what is this server's own."""
        messages = [{"role": "user", "content": f"Tell me a long story about {subject}."}]
        how = {"messages": messages, "max_tokens": tokens, "temperature": 0}
        found = self.client.post("/v1/chat/completions", json=how | more)
        found.raise_for_status()
        made: int = found.json()["usage"]["completion_tokens"]
        return made

    def rate(self, clients: int, tokens: int, more: dict[str, Any]) -> float:
        """Tokens a second, over all subjects."""
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            made = sum(pool.map(lambda subject: self.ask(subject, tokens, **more), SUBJECTS))
        return made / (time.perf_counter() - started)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(folder: Path, quantization: str) -> dict[str, Server]:
    """Those that start here."""
    base = str(folder / "model")
    ours = ["-m", "lorax", "serve", base, "--adapters", str(folder / "adapters")]
    code = "from transformers.cli.transformers import app; app()"
    theirs = ["-c", code, "serve", base, "--device", "cpu", "--log-level", "error"]
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = {
        "lorax": Server([sys.executable, *ours, "--quantization", quantization]),
        "transformers": Server([sys.executable, *theirs]),
    }
    for name in [name for name, server in found.items() if not server.is_ready()]:
        found.pop(name).stop()
    return found


def measure(
    servers: dict[str, Server], base: str, rounds: int, tokens: int
) -> dict[str, dict[str, float]]:
    """{what is asked: median tokens a second of one and of eight clients}."""
    more = {
        "lorax": {"model": base, "ignore_eos": True},
        "lorax adapter": {"model": "adapter", "ignore_eos": True},
        "transformers": {"model": base},
    }
    asked = {name: how for name, how in more.items() if name.split()[0] in servers}
    one: dict[str, list[float]] = {name: [] for name in asked}
    eight: dict[str, list[float]] = {name: [] for name in asked}
    for name, how in asked.items():
        servers[name.split()[0]].rate(CLIENTS, 4, how)
    for _ in range(rounds):
        for clients, rates in ((1, one), (CLIENTS, eight)):
            for name, how in asked.items():
                rates[name].append(servers[name.split()[0]].rate(clients, tokens, how))
    return {
        name: {
            "one_tokens_per_second": statistics.median(one[name]),
            "eight_tokens_per_second": statistics.median(eight[name]),
            "times": statistics.median(e / o for e, o in zip(eight[name], one[name], strict=True)),
        }
        for name in asked
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each prompt")
    parser.add_argument("--quantization", default="none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        write_tokenizer(lorax.load_tokenizer(smollm2_path()), folder / "model")
        (folder / "adapters").mkdir()
        (folder / "adapter").rename(folder / "adapters" / "adapter")
        servers = start(folder, options.quantization)
        try:
            found = measure(servers, str(folder / "model"), options.rounds, options.tokens)
        finally:
            for server in servers.values():
                server.stop()
    machine = sides.machine("torch", "transformers", "starlette", "uvicorn")
    settings = {k: getattr(options, k) for k in ("rounds", "tokens", "quantization")}
    sides.write_results(
        NAME, {"servers": found, "clients": CLIENTS, **settings, "machine": machine}
    )
    for name, r in found.items():
        print(
            f"{name:16} one client {r['one_tokens_per_second']:.1f}  eight "
            f"{r['eight_tokens_per_second']:.1f} tokens/s  {r['times']:.2f} times"
        )
    if "transformers" not in found:
        print("transformers serve did not start: pip install 'transformers[serving]'")


if __name__ == "__main__":
    main()
