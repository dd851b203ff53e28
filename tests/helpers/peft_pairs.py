"""One adapter in PEFT and in lorax: made there, carried over, compared."""

import copy
import warnings

import torch
from oracles import tokens
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file

import lorax

PREFIX = "base_model.model."


def in_peft(base, **config):
    """A PEFT model on a copy of `base`; A and B random, magnitudes near their norms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of GPT-2's orientation, and sets it
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config))
    disturb(model)
    return model.eval()


def disturb(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)


def pair(base, folder, trainable=False, **config):
    """(theirs, mine): the same base, the same random adapter, through PEFT's files."""
    base.save_pretrained(folder / "base")
    theirs = in_peft(base, **config)
    save(theirs, folder / "theirs")
    mine = lorax.load_model(folder / "base")
    lorax.load_adapter(mine, folder / "theirs", trainable=trainable)
    return theirs, mine


def save(theirs, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that embeddings are saved too
        theirs.save_pretrained(folder)


def largest_difference(mine, theirs, ids=None):
    ids = tokens() if ids is None else ids
    with torch.no_grad():
        return (mine(ids) - theirs(ids).logits).abs().max().item()


def relative_rms(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids)


def plain_name(name):
    """The parameter's path and its name in lorax, of PEFT's or of lorax's."""
    name = name.removeprefix(PREFIX).replace(".default", "")
    return name.replace("lora_B.bias", "lora_B_bias").removesuffix(".weight")


def trained(model):
    return {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def gradient_errors(mine, theirs, ids=None):
    """{name: relative error of its gradient}; both have the same names, and none is zero."""
    ids = tokens() if ids is None else ids
    for model, found in ((mine, mine(ids)), (theirs, theirs(ids).logits)):
        model.zero_grad()
        found.log_softmax(-1)[..., 5].mean().backward()
    expected, found = trained(theirs), trained(mine)
    assert set(found) == set(expected)
    errors = {}
    for name, parameter in found.items():
        size = expected[name].grad.norm()
        assert size > 0, name
        errors[name] = ((parameter.grad - expected[name].grad).norm() / size).item()
    return errors


def assert_same_files(theirs, ours):
    """Every tensor's name, dtype and bytes; every field of the config, as PEFT reads it."""
    one = load_file(theirs / "adapter_model.safetensors")
    two = load_file(ours / "adapter_model.safetensors")
    assert set(one) == set(two)
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name
    assert config_as_read(theirs) == config_as_read(ours)


def config_as_read(folder):
    """The config as PEFT reads it, by its fields; but for the base's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings without their start
        values = PeftConfig.from_pretrained(folder).to_dict()
    return values | {"base_model_name_or_path": None}
