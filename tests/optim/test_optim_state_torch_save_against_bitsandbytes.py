"""Optimizer states through torch.save, pickle, deepcopy and safetensors, as others' states go.

The oracles: torch.load gives back what was saved; a file is as large as that of the same tensors
cloned one by one; and bitsandbytes' own file, for its own 8-bit state of the same parameters.
"""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorax.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit

KINDS = (AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit)
SHAPES = {
    "two matrices": [(128, 64), (64, 128)],
    "small and odd ones": [(70, 70), (), (3,), (4097,), (16, 9), (0,), (65, 129)],
    "more than a page": [(600, 500), (8, 8), (9000,)],
}


def parameters(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def stepped(kind, ps, steps=3, **options):
    optimizer = kind(ps, lr=1e-2, **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return optimizer


def saved_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def cloned(state_dict):
    state = {
        i: {name: value.clone() for name, value in entry.items()}
        for i, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def assert_same_state(first, second):
    assert first["param_groups"] == second["param_groups"]
    assert list(first["state"]) == list(second["state"])
    for index, entry in first["state"].items():
        assert list(entry) == list(second["state"][index])
        for name, value in entry.items():
            other = second["state"][index][name]
            assert other.dtype == value.dtype
            assert torch.equal(other, value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_save_gives_the_state_back_and_training_goes_on_with_its_bits(kind, shapes, dtype):
    ours = parameters(shapes, dtype)
    optimizer = stepped(kind, ours)
    file = saved_bytes(optimizer.state_dict())
    back = torch.load(io.BytesIO(file))  # weights_only: no code of ours is in the file
    assert_same_state(back, optimizer.state_dict())
    twins = [nn.Parameter(p.detach().clone()) for p in ours]
    again = kind(twins)
    again.load_state_dict(back)
    assert_same_state(again.state_dict(), optimizer.state_dict())
    for p, twin in zip(ours, twins, strict=True):
        p.grad = torch.ones_like(p)
        twin.grad = torch.ones_like(p)
    optimizer.step()
    again.step()
    assert all(torch.equal(p, twin) for p, twin in zip(ours, twins, strict=True))
    assert_same_state(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_not_larger_than_the_state(kind, shapes):
    state = stepped(kind, parameters(shapes)).state_dict()
    assert len(saved_bytes(state)) <= len(saved_bytes(cloned(state)))
    first = state["state"][0]  # one parameter's, alone: not the page that it lies in
    assert len(saved_bytes(first)) <= len(saved_bytes({n: v.clone() for n, v in first.items()}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_not_larger_than_the_others(kind):
    """bitsandbytes' for the 8-bit states; torch's for the 32-bit ones, whose names they have."""
    optim = pytest.importorskip("bitsandbytes").optim
    shapes = [(256, 128), (512, 64), (8192,)]
    theirs = optim.AdamW8bit if issubclass(kind, AdamW8bit) else torch.optim.AdamW
    files = [saved_bytes(stepped(k, parameters(shapes)).state_dict()) for k in (kind, theirs)]
    assert len(files[0]) <= len(files[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda value: pickle.loads(pickle.dumps(value)),  # noqa: S301 - made here
        lambda value: torch.load(io.BytesIO(saved_bytes(value)), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_whole_optimizers_and_their_states_can_be_copied(kind, way):
    """An optimizer together with its parameters, as Lightning and Accelerate hand them around."""
    ours = parameters(SHAPES["small and odd ones"])
    optimizer = stepped(kind, ours)
    assert_same_state(way(optimizer.state_dict()), optimizer.state_dict())
    again, twins = way((optimizer, ours))
    assert_same_state(again.state_dict(), optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    for twin in twins:
        twin.grad = torch.ones_like(twin)
    again.step()
    assert_same_state(optimizer.state_dict(), before)  # nothing is shared
    for p in ours:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert_same_state(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_takes_the_states(kind, tmp_path):
    """safetensors refuses tensors that share memory."""
    state = stepped(kind, parameters(SHAPES["two matrices"])).state_dict()["state"]
    flat = {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}
    save_file(flat, tmp_path / "state.safetensors")
    back = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(back[name], value) for name, value in flat.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_handed_out_is_the_optimizers_own_memory(kind):
    """As in torch: a step moves the tensors of an earlier state_dict, too."""
    ours = parameters([(128, 64), (5,)])
    optimizer = stepped(kind, ours)
    held = optimizer.state_dict()["state"]
    before = copy.deepcopy(held)
    optimizer.step()
    now = optimizer.state_dict()["state"]
    for index, entry in now.items():
        assert not torch.equal(before[index]["exp_avg"], entry["exp_avg"])
        for name, value in entry.items():
            assert held[index][name].data_ptr() == value.data_ptr()
            assert torch.equal(held[index][name], value)
