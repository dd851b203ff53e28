"""How often the loss makes the host wait for a device: once, for how many tokens are trained.

`nonzero`, and indexing by a mask, which is a `nonzero` inside, give as many values as there are:
the host must know how many before it goes on. A CPU shows the calls, not the wait.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorax.models.llama import Llama
from lorax.models.llama_config import LlamaConfig
from lorax.training.loss import summed_loss

WAITING = ("nonzero", "masked_select", "_local_scalar_dense", "unique_dim", "_unique2")


class Waits(TorchDispatchMode):
    """What makes the host wait, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            places is not None and places.dtype == torch.bool for places in args[1]
        )
        if masks or name in WAITING:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Llama(config)
    model.lm_head.weight.requires_grad_(False)
    return model


def labelled(kind):
    """Rows with answers, prompts and padding."""
    labels = torch.randint(32, (3, 9))
    if kind == "answers":
        labels[:, :4] = -100
        labels[1, 6:] = -100
    elif kind == "nothing":
        labels[:] = -100
    return labels


@pytest.mark.parametrize("kind", ["answers", "everything", "nothing"])
def test_one_wait_forward_and_none_backward(kind):
    model, labels = tiny(), labelled(kind)
    with Waits() as forward:
        loss = summed_loss(model, labels.clamp_min(0), labels)
    assert forward.names == ["nonzero"]
    with Waits() as backward:
        loss.backward()
    assert backward.names == []


@pytest.mark.parametrize("kind", ["answers", "everything", "nothing"])
def test_loss_and_gradient_against_torch_over_masked_tokens(kind):
    """Against torch's cross entropy with its own mask, in float64."""
    model, labels = tiny().double(), labelled(kind)
    embedding = model.model.embed_tokens.weight
    loss = summed_loss(model, labels.clamp_min(0), labels)
    (mine,) = torch.autograd.grad(loss, [embedding])
    logits = model(labels.clamp_min(0))[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    (its,) = torch.autograd.grad(expected, [embedding])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
