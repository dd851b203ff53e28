"""AdamW and PagedAdamW against torch.optim.AdamW(foreach=False), bit for bit; state_dict."""

import copy
import gc

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorax.errors import UsageError
from lorax.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from lorax.optim import flat as flat_module
from lorax.optim.unified_memory import live_bytes

ALL = [AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit]
SHAPES = [(16, 37), (5,), (48, 16), (), (3, 700), (1,), (64, 8)]


def parameters(seed=0, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_gradients(ours, theirs, generator, scale=1.0, leave_out=()):
    for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        if index in leave_out:
            p.grad = q.grad = None
            continue
        gradient = torch.randn(p.shape, generator=generator) * scale
        p.grad, q.grad = gradient.to(p.dtype), gradient.to(q.dtype)


def assert_equal(ours, theirs, optimizer, oracle):
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert set(optimizer.state[p]) == set(oracle.state[q])
        for name, value in oracle.state[q].items():
            assert torch.equal(optimizer.state[p][name], value), name


group_values = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-6, 1e-1),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
        "eps": st.floats(1e-12, 1e-2),
        "weight_decay": st.just(0.0) | st.floats(1e-5, 0.5),
        "maximize": st.booleans(),
    }
)


@pytest.mark.parametrize("kind", [AdamW, PagedAdamW])
@settings(max_examples=12, deadline=None)
@given(
    groups=st.lists(group_values, min_size=1, max_size=3),
    scale=st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e4]),
    missing=st.sets(st.integers(0, len(SHAPES) - 1), max_size=3),
    seed=st.integers(0, 2**16),
)
def test_200_steps_against_torch(kind, groups, scale, missing, seed):
    ours = parameters(seed)
    theirs = copy.deepcopy(ours)

    def grouped(ps):
        return [{"params": ps[i :: len(groups)], **group} for i, group in enumerate(groups)]

    optimizer = kind(grouped(ours))
    oracle = torch.optim.AdamW(grouped(theirs), foreach=False)
    generator = torch.Generator().manual_seed(seed)
    for step in range(200):
        leave_out = missing if step % 3 == 1 else ()
        set_gradients(ours, theirs, generator, scale, leave_out)
        if step == 100:
            for group in (*optimizer.param_groups, *oracle.param_groups):
                group["lr"] *= 0.5
        optimizer.step()
        oracle.step()
    assert_equal(ours, theirs, optimizer, oracle)


@pytest.mark.parametrize("kind", [AdamW, PagedAdamW])
def test_tensors_larger_than_a_page_against_torch(kind, monkeypatch):
    monkeypatch.setitem(flat_module.PAGE_ELEMENTS, "cpu", 256)
    ours = parameters(shapes=[(30, 41), (256,), (255, 3), (7,), (100,), (100,), (100,)])
    transposed = nn.Parameter(torch.randn(33, 40).t())
    ours.append(transposed)
    theirs = copy.deepcopy(ours)
    assert not transposed.is_contiguous()
    optimizer = kind(ours, lr=1e-2)
    oracle = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        set_gradients(ours, theirs, generator)
        optimizer.step()
        oracle.step()
    assert_equal(ours, theirs, optimizer, oracle)


def test_float64_against_torch():
    ours = parameters(dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    optimizer, oracle = AdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        set_gradients(ours, theirs, generator)
        optimizer.step()
        oracle.step()
    assert_equal(ours, theirs, optimizer, oracle)


def test_bfloat16_parameters_have_float32_moments_and_one_rounding():
    ours = parameters(dtype=torch.bfloat16)
    exact = [nn.Parameter(p.detach().float()) for p in ours]
    optimizer, oracle = AdamW(ours), torch.optim.AdamW(exact, foreach=False)
    set_gradients(ours, exact, torch.Generator().manual_seed(1))
    for p, q in zip(ours, exact, strict=True):
        q.grad = p.grad.float()
    optimizer.step()
    oracle.step()
    for p, q in zip(ours, exact, strict=True):
        assert torch.equal(p, q.bfloat16())
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], oracle.state[q]["exp_avg_sq"])


def test_fused_torch_is_not_what_we_are_equal_to():
    """Why the oracle is foreach=False: torch's own implementations differ in bits."""
    ours = parameters(shapes=[(64, 64)])
    theirs = copy.deepcopy(ours)
    optimizer, oracle = AdamW(ours), torch.optim.AdamW(theirs, fused=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        set_gradients(ours, theirs, generator)
        optimizer.step()
        oracle.step()
    assert not torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ALL)
def test_state_saved_and_loaded_continues_bit_equal(first):
    """Across 32-bit paged and unpaged, and across 8-bit paged and unpaged."""
    family = [AdamW, PagedAdamW] if first in (AdamW, PagedAdamW) else [AdamW8bit, PagedAdamW8bit]
    for second in family:
        straight = parameters(shapes=[*SHAPES, (70, 70)])
        resumed = copy.deepcopy(straight)
        a, b = first(straight, lr=1e-2), first(resumed, lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        for step in range(60):
            set_gradients(straight, resumed, generator, leave_out=(2,) if step < 10 else ())
            if step == 30:
                saved = copy.deepcopy(b.state_dict())
                b = second(resumed, lr=99.0)
                b.load_state_dict(saved)
            a.step()
            b.step()
        assert_equal(straight, resumed, a, b)
        assert b.param_groups[0]["lr"] == 1e-2


def test_state_moves_to_torch_and_back():
    ours = parameters()
    theirs = copy.deepcopy(ours)
    optimizer, oracle = AdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        set_gradients(ours, theirs, generator)
        optimizer.step()
        oracle.step()
    swapped_ours = PagedAdamW(ours)
    swapped_ours.load_state_dict(oracle.state_dict())
    swapped_oracle = torch.optim.AdamW(theirs, foreach=False)
    swapped_oracle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        set_gradients(ours, theirs, generator)
        swapped_ours.step()
        swapped_oracle.step()
    assert_equal(ours, theirs, swapped_ours, swapped_oracle)


def test_loading_copies_the_state():
    ours = parameters()
    optimizer = AdamW(ours)
    set_gradients(ours, ours, torch.Generator())
    optimizer.step()
    other = AdamW(ours)
    other.load_state_dict(optimizer.state_dict())
    before = optimizer.state[ours[0]]["exp_avg"].clone()
    other.step()
    assert torch.equal(optimizer.state[ours[0]]["exp_avg"], before)
    assert optimizer.state[ours[0]]["step"] == 1
    assert other.state[ours[0]]["step"] == 2


@pytest.mark.parametrize("kind", ALL)
def test_deepcopy_goes_on_by_itself(kind):
    model = nn.Linear(70, 70)
    optimizer = kind(model.parameters(), lr=1e-2)
    model.weight.grad, model.bias.grad = torch.randn(70, 70), torch.randn(70)
    optimizer.step()
    again, twin = copy.deepcopy((optimizer, model))
    twin.weight.grad, twin.bias.grad = model.weight.grad.clone(), model.bias.grad.clone()
    optimizer.step()
    before = twin.weight.detach().clone()
    assert not torch.equal(before, model.weight)
    again.step()
    assert torch.equal(twin.weight, model.weight)


@pytest.mark.parametrize("kind", ALL)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind):
    ours = parameters(shapes=[(70, 70), (4,)])
    optimizer = kind(ours, lr=1e-2)
    set_gradients(ours, ours, torch.Generator())
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    fewer = kind(ours[:1], lr=1e-2)
    with pytest.raises(UsageError, match="groups"):
        fewer.load_state_dict(good)
    spoiled = copy.deepcopy(good)
    spoiled["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(UsageError, match="exp_avg"):
        optimizer.load_state_dict(spoiled)
    spoiled = copy.deepcopy(good)
    del spoiled["state"][0]["exp_avg_sq"]
    with pytest.raises(UsageError, match="exp_avg_sq"):
        optimizer.load_state_dict(spoiled)
    spoiled = copy.deepcopy(good)
    spoiled["state"][7] = spoiled["state"][0]
    with pytest.raises(UsageError, match="no group"):
        optimizer.load_state_dict(spoiled)
    now = optimizer.state_dict()
    for index, state in good["state"].items():
        for name, value in state.items():
            assert torch.equal(now["state"][index][name], value)
    assert now["param_groups"] == good["param_groups"]


def test_8bit_and_32bit_states_are_not_mixed_up():
    ours = parameters(shapes=[(70, 70)])
    wide, narrow = AdamW(ours), AdamW8bit(ours)
    set_gradients(ours, ours, torch.Generator())
    wide.step()
    narrow.step()
    with pytest.raises(UsageError, match="another kind of optimizer"):
        AdamW(ours).load_state_dict(narrow.state_dict())
    with pytest.raises(UsageError, match="another kind of optimizer"):
        AdamW8bit(ours).load_state_dict(wide.state_dict())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"betas": (0.9, "x")}, "betas"),
        ({"lr": None}, "lr"),
        ({"amsgrad": True}, "amsgrad"),
        ({"capturable": True}, "capturable"),
        ({"differentiable": True}, "differentiable"),
    ],
)
@pytest.mark.parametrize("kind", ALL)
def test_values_out_of_range_are_refused(kind, arguments, named):
    with pytest.raises(UsageError, match=named):
        kind(parameters(), **arguments)
    with pytest.raises(UsageError, match=named):
        kind([{"params": parameters(), **arguments}])


def test_what_cannot_be_stepped_is_refused():
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError, match="sparse"):
        AdamW(table.parameters()).step()
    with pytest.raises(UsageError, match="no moments"):
        AdamW(ours := parameters()).moments(ours[0])


def test_closure_schedules_and_new_groups():
    ours = parameters()
    theirs = copy.deepcopy(ours)
    optimizer = AdamW(ours[:3], lr=1e-2)
    oracle = torch.optim.AdamW(theirs[:3], lr=1e-2, foreach=False)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.1) for o in (optimizer, oracle)]
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        if step == 4:
            optimizer.add_param_group({"params": ours[3:], "lr": 1e-3})
            oracle.add_param_group({"params": theirs[3:], "lr": 1e-3})
            for schedule in schedules:
                schedule.base_lrs.append(1e-3)
        set_gradients(ours, theirs, generator)
        assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
        oracle.step()
        for schedule in schedules:
            schedule.step()
    assert_equal(ours, theirs, optimizer, oracle)


@pytest.mark.parametrize("kind", ALL)
def test_all_states_lie_in_one_allocation(kind):
    ours = parameters(shapes=[(70, 70), (16, 500), (4,), (100,)] * 30)
    optimizer = kind(ours)
    set_gradients(ours, ours, torch.Generator())
    optimizer.step()
    (memory,) = {page.memory.untyped_storage() for page in optimizer._pages}
    inside = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes())
    for state in optimizer.state.values():
        assert all(tensor.data_ptr() in inside for n, tensor in state.items() if n != "step")


def test_32bit_states_take_8_bytes_a_parameter():
    ours = parameters(shapes=[(16, 576), (576, 16)] * 40)
    optimizer = AdamW(ours)
    assert optimizer.state_bytes() == 0
    set_gradients(ours, ours, torch.Generator())
    optimizer.step()
    count = sum(p.numel() for p in ours)
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert held == 8 * count + 4 * len(ours)
    assert held <= optimizer.state_bytes() <= 1.001 * held


@pytest.mark.parametrize("kind", ALL)
def test_1000_optimizers_leave_no_memory_behind(kind):
    """A lost state would be 66 MB after 1,000 (17 MB in 8 bits), a lost scratch 2 GB."""
    small = [nn.Parameter(torch.zeros(16, 256)) for _ in range(2)]
    for p in small:
        p.grad = torch.ones_like(p)
    gc.disable()  # reference counts must do: a cycle would keep pages until the collector runs
    try:
        for _ in range(20):
            kind(small).step()
        before = psutil.Process().memory_info().rss
        for _ in range(1000):
            kind(small).step()
        assert psutil.Process().memory_info().rss - before < 8e6
    finally:
        gc.enable()
    assert live_bytes() == 0
