"""What Prometheus reads: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from __future__ import annotations

from collections import Counter

from lorax.inference.server.engine import Engine

_KNOWN = (
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/load_lora_adapter"),
    *("/v1/unload_lora_adapter", "/health", "/metrics"),
)


class Metrics:
    """Counts of answers, and the page with them and the engine's."""

    def __init__(self) -> None:
        self.answered: Counter[tuple[str, int]] = Counter()

    def count(self, path: str, status: int) -> None:
        """One more; what clients make up counts as one path."""
        self.answered[path if path in _KNOWN else "other", status] += 1

    def text(self, engine: Engine, adapters: int) -> str:
        """The page; adapters: how many have names."""
        lines: list[str] = []
        _add(lines, "requests_total", "counter", "HTTP answers.", {
            f'{{path="{path}",status="{status}"}}': count
            for (path, status), count in sorted(self.answered.items())
        })  # fmt: skip
        counts = engine.counts
        for name, what in {
            "prompt_tokens": "Tokens of prompts that got a slot.",
            "tokens": "Tokens made.",
            "answers": "Answers that came to their end.",
            "cancelled": "Answers whose client left.",
            "failed": "Answers that ended with an error.",
            "rounds": "Passes through the model for a token each.",
        }.items():
            _add(lines, f"{name}_total", "counter", what, {"": counts[name]})
        _add(lines, "time_to_first_token_seconds_sum", "counter",
             "From asking to the first token, over all answers.",
             {"": engine.first_token_seconds})  # fmt: skip
        for name, what, value in (
            ("running", "Answers in a slot.", engine.running),
            ("waiting", "Answers that wait for a slot.", engine.waiting),
            ("slots", "Slots of the cache.", engine.limits.slots),
            ("adapters", "Adapters that have a name.", adapters),
            ("adapters_in_memory", "Of these, in memory.", len(engine.adapters.in_memory)),
        ):
            _add(lines, name, "gauge", what, {"": value})
        return "\n".join(lines) + "\n"


def _add(
    lines: list[str], name: str, kind: str, what: str, values: dict[str, int] | dict[str, float]
) -> None:
    lines += [f"# HELP lorax_{name} {what}", f"# TYPE lorax_{name} {kind}"]
    lines += [f"lorax_{name}{labels} {value}" for labels, value in values.items()]
