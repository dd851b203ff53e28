"""An optimizer's state as safetensors: what comes back is what went in, bit for bit."""

import contextlib
import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lorax.errors import FormatError, LoraxError, UsageError
from lorax.formats.optimizer_files import load_optimizer_state, save_optimizer_state
from lorax.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit

PAIRS = [(AdamW, PagedAdamW), (PagedAdamW, AdamW), (AdamW8bit, PagedAdamW8bit)]


def gradients(ps, qs, generator):
    for p, q in zip(ps, qs, strict=True):
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()


def grouped(ps, lr):
    return [{"params": ps[:2], "lr": lr}, {"params": ps[2:], "lr": lr / 3, "weight_decay": 0.3}]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@settings(max_examples=5, deadline=None)
@given(lr=st.floats(1e-5, 1e-1), beta=st.floats(0.5, 0.999), seed=st.integers(0, 2**16))
def test_a_run_continued_from_the_file_is_bit_equal(
    tmp_path_factory, first, second, lr, beta, seed
):
    path = tmp_path_factory.mktemp("state") / "optimizer.safetensors"
    generator = torch.Generator().manual_seed(seed)
    straight = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((70, 70), (5,), (9, 3))]
    resumed = copy.deepcopy(straight)
    a = first(grouped(straight, lr), betas=(beta, beta))
    b = first(grouped(resumed, lr), betas=(beta, beta))
    for step in range(20):
        gradients(straight, resumed, generator)
        if step == 10:
            save_optimizer_state(b.state_dict(), path)
            b = second(grouped(resumed, 1.0))
            b.load_state_dict(load_optimizer_state(path))
        a.step()
        b.step()
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)
        for name, value in a.state[p].items():
            assert torch.equal(b.state[q][name], value)
    assert b.state_dict()["param_groups"] == a.state_dict()["param_groups"]


def test_torchs_own_state_is_kept_too(tmp_path):
    p = nn.Parameter(torch.randn(10))
    p.grad = torch.randn(10)
    optimizer = torch.optim.AdamW([p], lr=torch.tensor(1e-3), foreach=False)
    optimizer.step()
    save_optimizer_state(optimizer.state_dict(), tmp_path / "s.safetensors")
    again = load_optimizer_state(tmp_path / "s.safetensors")
    assert torch.equal(again["state"][0]["exp_avg"], optimizer.state[p]["exp_avg"])
    assert again["param_groups"][0]["betas"] == (0.9, 0.999)
    assert again["param_groups"][0]["lr"] == torch.tensor(1e-3).item()


def test_what_is_no_plain_value_is_refused(tmp_path):
    with pytest.raises(UsageError, match="hook"):
        save_optimizer_state(
            {"state": {}, "param_groups": [{"params": [], "hook": print}]}, tmp_path / "s"
        )
    with pytest.raises(UsageError, match="step"):
        save_optimizer_state({"state": {0: {"step": 3}}, "param_groups": []}, tmp_path / "s")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(FormatError, match=r"s\.safetensors"):
        load_optimizer_state(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="no optimizer"):
        load_optimizer_state(path)
    for groups in ("[]", "{}", '{"param_groups": 3}', '{"param_groups": [{}]}', "{", '{"a": NaN}'):
        save_file({}, path, metadata={"lorax_optimizer": groups})
        with pytest.raises(FormatError, match=r"s\.safetensors"):
            load_optimizer_state(path)
    good = json.dumps({"param_groups": []})
    save_file({"state.x.exp_avg": torch.zeros(1)}, path, metadata={"lorax_optimizer": good})
    with pytest.raises(FormatError, match="expected state"):
        load_optimizer_state(path)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_our_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "s.safetensors"
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    optimizer = AdamW([p])
    optimizer.step()
    save_optimizer_state(optimizer.state_dict(), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    with contextlib.suppress(LoraxError):
        AdamW([p]).load_state_dict(load_optimizer_state(path))
