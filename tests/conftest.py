"""What all tests share: hypothesis profiles, the real model, guarded buffers, quiet libraries.

It also runs on a bare GPU machine, for `make gpu`: there only torch, triton, numpy, safetensors and
pytest are to be had, so everything else is imported where it is used.
"""

import logging
import os
from importlib import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LORAX_ESTIMATE", "0")  # 1.4 s a run; the estimate has tests of its own

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: without a GPU its kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import hypothesis
except ImportError:
    hypothesis = None  # a bare GPU machine; the tests that draw examples do not run there
else:
    # No deadline: these machines are noisy. `ci` draws the same examples each time.
    ci = hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
    hypothesis.settings.register_profile("ci", ci)
    # Where a planted fault fails a test, no smaller example of it is looked for.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", ci, phases=phases)
    hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# `make quick` leaves these folders out, and single files that mark themselves.
SLOW_FOLDERS = {"benchmarks", "cli", "kernels", "optim"}

SECONDS, SLOW_SECONDS = 120, 600  # for one test; a hang is then a failure that says where


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the slow folders, limit the time; skip, and count, gpu tests where there is no CUDA."""
    limits = config.pluginmanager.hasplugin("timeout")  # not on a bare GPU machine
    for item in items:
        if item.path.parent.name in SLOW_FOLDERS or item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)
        if limits and not item.get_closest_marker("timeout") and not config.option.timeout:
            slow = item.get_closest_marker("slow") is not None
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS if slow else SECONDS))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


REGISTRIES = {
    "lorax.adapters.variants": "_table",
    "lorax.models.families": "FAMILIES",
    "lorax.quant.codebooks": "CODEBOOKS",
    "lorax.training.hooks": "_factories",
    "lorax.plugins": "_loaded",
}


@pytest.fixture(autouse=True, scope="module")
def registries():
    """What a module's tests register is gone after it: the next one finds lorax's own alone."""
    import_module("lorax.adapters.variants").variants()  # lorax's own, in their order
    tables = [getattr(import_module(module), name) for module, name in REGISTRIES.items()]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="session")
def smollm2_gguf():
    from lorax.demo import smollm2_path

    return smollm2_path()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """SmolLM2-135M-Instruct in float32. Shared: leave it as you found it."""
    import lorax

    return lorax.load_model(smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2_short(smollm2_gguf, tmp_path_factory):
    """A directory of SmolLM2's first layers, in float32: its words, less of the work.

    `make nightly` takes all 30 (LORAX_SMOLLM2_LAYERS).
    """
    from smollm2 import shorten

    import lorax

    directory = tmp_path_factory.mktemp("short") / "SmolLM2-135M-Instruct"
    model = shorten(lorax.load_model(smollm2_gguf))
    lorax.save_model(model, directory, tokenizer=lorax.load_tokenizer(smollm2_gguf))
    return str(directory)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_gguf):
    import lorax

    return lorax.load_tokenizer(smollm2_gguf)


@pytest.fixture
def no_picture(monkeypatch):
    """Runs without loss.png, whose drawing takes longer than their steps."""
    monkeypatch.setattr("lorax.training.loop.draw_loss", lambda lines, path, warn: None)


@pytest.fixture
def loftq_on_a_cpu(monkeypatch):
    """PEFT's LoftQ, made to run without CUDA."""
    from loftq_on_cpu import loftq_on_a_cpu

    return loftq_on_a_cpu(monkeypatch)


@pytest.fixture
def guard():
    """Allocates buffers with canaries around them, for the test and for the kernels it calls."""
    from kernel_testing import guarded

    with guarded() as allocator:
        yield allocator


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that the interpreter gets through quickly; a GPU keeps its own."""
    from kernel_testing import shrink_tiles

    shrink_tiles(monkeypatch)


@pytest.fixture
def r9():
    """Gathers results; at the test's end their errors are held to R9's bound."""
    from kernel_testing import WithinR9

    collected = WithinR9()
    yield collected
    collected.check()
