"""A server in this process, on a thread and a free port, over a tiny model with adapters."""

import threading
from contextlib import contextmanager

import openai
import torch
from oracles import llama
from peft_pairs import in_peft, save
from tiny_tokenizer import CHATML, byte_tokenizer

import lorax
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.inference.server.limits import Limits
from lorax.inference.server.run import Service, open_engine

SIZES = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ADAPTERS = {
    "plain": {"r": 4, "target_modules": "all-linear"},
    "rslora": {"r": 7, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": "all-linear"},
    "saved": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}


def make_directories(folder, adapters=ADAPTERS, **sizes):
    """base, adapters/NAME for each, and more/later, which no server starts with."""
    torch.manual_seed(0)
    base = llama(**SIZES | sizes)
    base.save_pretrained(folder / "base")
    write_tokenizer(byte_tokenizer(chat_template=CHATML), folder / "base")
    for name, settings in adapters.items():
        save(in_peft(base, **settings), folder / "adapters" / name)
    return folder


@contextmanager
def serving(folder, limits=None, api_key=None, adapters="adapters", **options):
    """The Service, which answers; drained at the end."""
    directory = None if adapters is None else folder / adapters
    engine, models = open_engine(str(folder / "base"), directory, limits or Limits(), **options)
    ready = threading.Event()
    service = Service(engine, models, port=0, api_key=api_key, say=lambda address: ready.set())
    thread = threading.Thread(target=service.serve_until_told)
    thread.start()
    try:
        assert ready.wait(10)
        yield service
    finally:
        service.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def connected(service, key="none", **options):
    """The official client."""
    return openai.OpenAI(
        base_url=f"{service.address}/v1", api_key=key, max_retries=0, timeout=60, **options
    )


def oracle_of(folder, adapters=ADAPTERS):
    """generate(prompt, adapter, ...) of the library, on a model of its own."""
    model = lorax.load_model(folder / "base")
    tokenizer = lorax.load_tokenizer(folder / "base")
    for name in adapters:
        lorax.load_adapter(model, folder / "adapters" / name, name=name)

    def generate(prompt, adapter=None, **options):
        with lorax.use_adapter(model, adapter):
            return lorax.generate(model, tokenizer, prompt, **options)

    generate.tokenizer = tokenizer
    return generate
