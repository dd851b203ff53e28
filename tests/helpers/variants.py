"""Variants of the family on a tiny Llama and a tiny GPT-2, written by PEFT and by lorax."""

import copy
import dataclasses
import warnings
from dataclasses import dataclass, field

import torch
from oracles import gpt2, llama
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny_tokenizer import CHATML, byte_tokenizer

import lorax
from lorax.adapters.adalora.layer import AdaLoRAConfig, AdaLoRALinear
from lorax.adapters.attached import adapter_layers
from lorax.adapters.stated import adapter_config
from lorax.formats.tokenizer_files import write_tokenizer

SIZES = {  # 64 wide: bitsandbytes' decoder is right where rows are multiples of the block
    "llama": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2},
}  # fmt: skip
MAKE = {"llama": llama, "gpt2": gpt2}


@dataclass(frozen=True)
class Variant:
    """kind: of the base; changes: to its config; settings: LoRAConfig's; adalora: instead."""

    kind: str
    settings: dict
    changes: dict = field(default_factory=dict)
    adalora: bool = False


def make_base(folder, kind, **changes):
    """A random base with a tokenizer of bytes, and transformers' model of it."""
    model = MAKE[kind](vocab_size=261, **SIZES[kind], **changes)
    model.save_pretrained(folder)
    write_tokenizer(byte_tokenizer(chat_template=CHATML), folder)
    return model


def by_peft(base, variant, folder):
    """An adapter of that variant as PEFT makes and saves it, all of it moved from its start."""
    kind = AdaLoraConfig if variant.adalora else LoraConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's orientation, tied heads, embeddings are saved
        config = kind(task_type="CAUSAL_LM", **copy.deepcopy(variant.settings))
        model = get_peft_model(copy.deepcopy(base), config).eval()
        move(model)
        if variant.adalora:
            names = [n for n, _ in model.base_model.model.named_parameters() if "lora_E" in n]
            ranks = patterns(names, config.init_r)
            with torch.no_grad():
                for name, parameter in model.base_model.model.named_parameters():
                    if name in ranks:
                        parameter[~torch.tensor(ranks[name])] = 0.0
            model.peft_config["default"].rank_pattern = ranks
        model.save_pretrained(folder)


def by_lorax(base, variant, folder):
    """The same as lorax makes and saves it. base: the directory."""
    model = lorax.load_model(base, "float32")
    kind = AdaLoRAConfig if variant.adalora else lorax.LoRAConfig
    lorax.add_adapter(model, kind(**copy.deepcopy(variant.settings)))
    move(model)
    if variant.adalora:
        prune(model)
    lorax.save_adapter(model, folder)


def move(model):
    """Every trainable tensor away from its start; DoRA's magnitudes stay near the norms."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def patterns(names, rank):
    """Which ranks are left: none in the first layer, and in others some."""
    generator = torch.Generator().manual_seed(3)
    found = {name: (torch.rand(rank, generator=generator) < 0.5).tolist() for name in names}
    return found | {names[0]: [False] * rank}


def prune(model):
    """Take ranks out of lorax's AdaLoRA as its allocator does in the end."""
    layers = {n: m for n, m in adapter_layers(model).items() if isinstance(m, AdaLoRALinear)}
    config = adapter_config(model)
    kept = patterns([f"{name}.lora_E" for name in layers], config.init_r)
    for name, layer in layers.items():
        layer.prune(kept[f"{name}.lora_E"])
    model.adapter_config = dataclasses.replace(config, rank_pattern=kept)
