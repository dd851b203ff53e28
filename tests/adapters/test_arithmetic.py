"""Adapters as data: the laws that hold for them, dense float64 matrices and PEFT as oracles."""

import copy
import json
import math

import hypothesis.strategies as st
import pytest
import torch
from command_line import complete_lorax
from hypothesis import given
from oracles import gpt2, llama, peft_model, tokens
from peft import PeftModel

import lorax
from lorax.adapters.arithmetic import Adapter, LowRank, angle, cosine, inner, norm, sizes
from lorax.adapters.attached import adapter_layers
from lorax.errors import AdapterError

U32 = torch.finfo(torch.float32).eps / 2

seeds = st.integers(0, 2**31)
ranks = st.integers(1, 12)
scales = st.floats(-8, 8, width=32).filter(lambda s: abs(s) > 1e-3)
shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))


def random_matrix(shape, r, scaling=1.0):
    return LowRank(torch.randn(r, shape[1]), torch.randn(shape[0], r), scaling)


def close(one, two, like):
    """Equal up to float32's rounding of factors whose absolute product is `like`."""
    return bool(((one - two).abs() <= 8 * U32 * like + 1e-30).all())


def absolute(matrix):
    return abs(matrix.scaling) * (matrix.B.abs().double() @ matrix.A.abs().double())


# --- the laws -----------------------------------------------------------------------------------


@given(shapes, ranks, ranks, scales, scales, scales, scales, seeds)
def test_adding_is_exact_and_commutes(shape, r1, r2, s1, s2, w1, w2, seed):
    torch.manual_seed(seed)
    a, b = random_matrix(shape, r1, s1), random_matrix(shape, r2, s2)
    total = w1 * a + w2 * b
    assert total.rank == r1 + r2
    exact = w1 * a.dense() + w2 * b.dense()
    like = abs(w1) * absolute(a) + abs(w2) * absolute(b)
    assert close(total.dense(), exact, like)
    assert close((w2 * b + w1 * a).dense(), total.dense(), like)


@given(shapes, ranks, scales, seeds)
def test_an_adapter_minus_itself_is_zero(shape, r, s, seed):
    torch.manual_seed(seed)
    a = random_matrix(shape, r, s)
    zero = a - a
    assert norm(zero) <= 1e-14 * norm(a)
    assert torch.equal(zero.B[:, :r], -zero.B[:, r:])  # not a bit is lost
    assert zero.dense().norm() <= 1e-14 * norm(a)


@given(shapes, ranks, scales, scales, seeds)
def test_scaling(shape, r, s, w, seed):
    torch.manual_seed(seed)
    a = random_matrix(shape, r, s)
    scaled = w * a
    assert torch.equal(scaled.A, a.A)
    assert torch.equal(scaled.B, a.B)
    assert norm(scaled) == pytest.approx(abs(w) * norm(a), rel=1e-12)
    assert torch.allclose((a * w).dense(), w * a.dense(), rtol=1e-12)


@given(shapes, ranks, scales, seeds)
def test_norms_and_singular_values_against_the_dense_matrix(shape, r, s, seed):
    torch.manual_seed(seed)
    a = random_matrix(shape, r, s)
    expected = torch.linalg.svdvals(a.dense())
    found = a.singular_values()
    assert len(found) == min(r, *shape)
    size = expected[0].item()
    assert torch.allclose(found, expected[: len(found)], rtol=0, atol=1e-13 * size)
    assert (expected[len(found) :] <= 1e-13 * size).all()
    assert norm(a) == pytest.approx(a.dense().norm().item(), rel=1e-12)


@given(shapes, ranks, st.integers(1, 14), scales, seeds)
def test_truncation_loses_the_tail_of_the_singular_values(shape, r, k, s, seed):
    torch.manual_seed(seed)
    a = random_matrix(shape, r, s)
    near, error = a.truncate(k)
    values = torch.linalg.svdvals(a.dense())
    assert near.rank == min(k, r, *shape)
    assert error == pytest.approx(values[k:].norm().item(), rel=1e-9, abs=1e-12 * norm(a))
    lost = (near.dense() - a.dense()).norm().item()
    assert lost == pytest.approx(error, rel=1e-4, abs=20 * U32 * norm(a))


@given(shapes, ranks, ranks, scales, scales, seeds)
def test_inner_products_and_angles(shape, r1, r2, s1, s2, seed):
    torch.manual_seed(seed)
    a, b = random_matrix(shape, r1, s1), random_matrix(shape, r2, s2)
    x, y = a.dense().flatten(), b.dense().flatten()
    size = (x.norm() * y.norm()).item()
    assert inner(a, b) == pytest.approx((x @ y).item(), abs=1e-12 * size)
    one, two = Adapter({"m": a}), Adapter({"m": b})
    assert cosine(one, two) == pytest.approx((x @ y).item() / size, abs=1e-12)
    exact = math.degrees(math.acos(max(-1.0, min(1.0, (x @ y).item() / size))))
    assert angle(one, two) == pytest.approx(exact, abs=3e-6)  # the arc cosine's own error
    assert angle(one, two) == pytest.approx(angle(two, one), abs=1e-9)


@given(shapes, ranks, scales, seeds)
def test_the_angle_to_itself_its_multiples_and_its_opposite(shape, r, s, seed):
    torch.manual_seed(seed)
    a = Adapter({"m": random_matrix(shape, r, s), "n": random_matrix(shape, 1)})
    assert angle(a, a) == pytest.approx(0.0, abs=1e-12)
    assert angle(a, 3.7 * a) == pytest.approx(0.0, abs=1e-12)
    assert angle(a, -0.5 * a) == pytest.approx(180.0, abs=1e-12)


@given(ranks, ranks, seeds)
def test_what_shares_no_row_stands_at_90_degrees(r1, r2, seed):
    torch.manual_seed(seed)
    a, b = random_matrix((20, 9), r1), random_matrix((20, 9), r2)
    a.B[10:] = 0
    b.B[:10] = 0
    one, two = Adapter({"m": a, "n": a}), Adapter({"m": b, "k": b})
    assert angle(one, two) == pytest.approx(90.0, abs=1e-12)
    assert cosine(one, two) == pytest.approx(0.0, abs=1e-15)
    assert (one + two).norm() == pytest.approx(math.hypot(one.norm(), two.norm()), rel=1e-12)


def test_small_angles_keep_their_digits():
    """acos of a cosine in float64 cannot tell angles below 1e-6 degrees from zero."""
    A, B = torch.zeros(1, 4), torch.zeros(4, 1)
    A[0, 0] = B[0, 0] = 1.0
    turned = A.clone()
    turned[0, 1] = 2.0**-40
    one, two = (Adapter({"m": LowRank(rows, B)}) for rows in (A, turned))
    assert angle(one, two) == pytest.approx(math.degrees(2.0**-40), rel=1e-12)


@pytest.mark.parametrize(("values", "expected"), [([1, 1, 1], 3.0), ([1, 0, 0], 1.0), ([0], 0.0)])
def test_effective_rank(values, expected):
    S = torch.diag(torch.tensor(values, dtype=torch.float32))
    layer = LowRank(S, torch.eye(len(values)))
    found = list(sizes(Adapter({"m": layer})))
    assert [size.layer for size in found] == ["m", "all"]
    assert found[0].effective_rank == pytest.approx(expected)
    assert found[0].spectral == max(values)


def test_the_angle_to_nothing_is_not_a_number():
    a = Adapter({"m": random_matrix((4, 5), 2)})
    assert math.isnan(angle(a, 0.0 * a))
    assert math.isnan(cosine(a, Adapter({"m": LowRank(torch.zeros(1, 5), torch.zeros(4, 1))})))


@pytest.mark.parametrize("call", [LowRank.__add__, LowRank.__sub__, inner])
def test_other_shapes_are_refused(call):
    with pytest.raises(AdapterError, match=r"\(4, 5\) and \(5, 4\)"):
        call(random_matrix((4, 5), 2), random_matrix((5, 4), 2))


def test_no_large_matrix_is_formed():
    """A layer of 100,000 x 100,000: its dense matrix would be 80 GB."""
    a, b = (random_matrix((100_000, 100_000), 4) for _ in range(2))
    one, two = Adapter({"m": a}), Adapter({"m": b})
    assert 80 < angle(one, two) < 100
    near, errors = (one + two).truncate(4)
    assert near.layers["m"].rank == 4
    assert 0.3 < errors["m"] < 1


# --- files, and PEFT ----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A base's directory and adapters of PEFT beside it."""

    def save(base, *configs):
        base.save_pretrained(tmp_path / "base")
        for i, config in enumerate(configs):
            peft_model(base, **config).save_pretrained(tmp_path / str(i))
        return [tmp_path / str(i) for i in range(len(configs))]

    return save


def logits_in_peft(base, path):
    model = PeftModel.from_pretrained(copy.deepcopy(base), path).eval()
    with torch.no_grad():
        return model(tokens()).logits


def logits_of_sum(base, *terms):
    """The base with weight * adapter added to its dense weights."""
    model = copy.deepcopy(base)
    for weight, adapter in terms:
        for name, layer in adapter.layers.items():
            module = model.get_submodule(name)
            delta = weight * layer.dense()
            delta = delta.t() if type(module).__name__ == "Conv1D" else delta
            module.weight.data += delta.to(module.weight)
    with torch.no_grad():
        return model(tokens()).logits


CASES = {
    "the same modules": (
        llama,
        {"target_modules": ["q_proj", "down_proj"], "r": 4},
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5},
    ),
    "some modules": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "r": 4, "use_rslora": True},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    ),
    "gpt2": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "r": 2, "lora_alpha": 4},
        {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {"h.2.attn.c_attn": 1}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sum_that_is_written_loads_in_peft_and_lorax(case, saved, tmp_path):
    make, *configs = CASES[case]
    base = make()
    one, two = (lorax.read_adapter(path) for path in saved(base, *configs))
    lorax.write_adapter(0.5 * one - 0.25 * two, tmp_path / "sum")
    expected = logits_of_sum(base, (0.5, one), (-0.25, two))
    assert (logits_in_peft(base, tmp_path / "sum") - expected).abs().max() <= 1e-5
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "sum")
    with torch.no_grad():
        assert (mine(tokens()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_scaled_and_truncated_adapters_load_in_peft(case, saved, tmp_path):
    make, config, _ = CASES[case]
    base = make()
    (path,) = saved(base, config)
    adapter = lorax.read_adapter(path)
    for name, changed in (("scaled", -1.5 * adapter), ("truncated", adapter.truncate(1)[0])):
        lorax.write_adapter(changed, tmp_path / name)
        expected = logits_of_sum(base, (1, changed))
        assert (logits_in_peft(base, tmp_path / name) - expected).abs().max() <= 1e-5


def test_a_written_adapter_reads_back_bit_for_bit(saved, tmp_path):
    config = {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"layers.0.mlp.up_proj": 3},
        "alpha_pattern": {"layers.2.self_attn.q_proj": 5},
    }
    adapter = lorax.read_adapter(saved(llama(), config)[0])
    lorax.write_adapter(adapter, tmp_path / "again")
    again = lorax.read_adapter(tmp_path / "again")
    assert set(again.layers) == set(adapter.layers)
    for name, layer in adapter.layers.items():
        assert torch.equal(again.layers[name].A, layer.A)
        assert torch.equal(again.layers[name].B, layer.B)
        assert again.layers[name].scaling == pytest.approx(layer.scaling, rel=1e-15)
    assert again.base == adapter.base


@pytest.mark.parametrize("how", [True, "pissa", "olora"])
def test_a_model_s_adapter_as_data(how, saved, tmp_path):
    base = llama()
    saved(base)
    model = lorax.load_model(tmp_path / "base")
    config = {"target_modules": ["q_proj", "down_proj"], "r": 3, "init_lora_weights": how}
    lorax.add_adapter(model, lorax.LoRAConfig(**config))
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_A.add_(torch.randn_like(layer.lora_A) * 0.1)
            layer.lora_B.add_(torch.randn_like(layer.lora_B) * 0.1)
    adapter = Adapter.of(model)
    assert all(layer.rank == (3 if how is True else 6) for layer in adapter.layers.values())
    lorax.write_adapter(adapter, tmp_path / "adapter")
    with torch.no_grad():
        found = model(tokens())
    assert (logits_in_peft(base, tmp_path / "adapter") - found).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_files_that_are_no_matrix_by_themselves_are_refused(config, word, saved):
    (path,) = saved(llama(), {"target_modules": ["q_proj"], **config})
    with pytest.raises(AdapterError, match=f"{word}.*depends on its base"):
        lorax.read_adapter(path)


def test_loftq_s_adapter_alone_is_refused(saved, tmp_path):
    saved(llama())
    model = lorax.load_model(tmp_path / "base")
    config = lorax.LoRAConfig(init_lora_weights="loftq", target_modules=["q_proj"])
    lorax.add_adapter(model, config)
    lorax.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="loftq"):
        lorax.read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="LoftQ"):
        Adapter.of(model)


@pytest.mark.parametrize("fault", ["half", "name", "rank", "nan", "whole numbers"])
def test_damaged_files_are_refused_by_name(fault, saved):
    from safetensors.torch import load_file, save_file

    (path,) = saved(llama(), {"target_modules": ["q_proj"]})
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    if fault == "half":
        del tensors[name]
    elif fault == "name":
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_E"] = tensors.pop(name)
    elif fault == "rank":
        tensors[name] = tensors[name][:3].contiguous()
    elif fault == "nan":
        tensors[name][0, 0] = float("nan")
    else:
        tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj"):
        lorax.read_adapter(path)


# --- the command --------------------------------------------------------------------------------


def inspect(*arguments):
    return run("inspect", "adapter", *arguments)


def run(*arguments):
    return complete_lorax(*arguments)


def test_the_command(saved, tmp_path):
    config = {"target_modules": ["q_proj", "up_proj"], "r": 4}
    one, two, other = saved(llama(), config, config, {"target_modules": ["k_proj"]})
    found = json.loads(inspect(one, "--against", two, "--json").stdout)
    a, b = lorax.read_adapter(one), lorax.read_adapter(two)
    assert {row["layer"] for row in found["layers"]} == set(a.layers)
    for row in found["layers"]:
        layer = a.layers[row["layer"]]
        assert row["frobenius"] == pytest.approx(layer.dense().norm().item())
        assert row["spectral"] == pytest.approx(torch.linalg.svdvals(layer.dense())[0].item())
        assert row["rank"] == 4
        assert 1 < row["effective_rank"] <= 4
    assert found["all"]["layer"] == "all"
    assert found["all"]["frobenius"] == pytest.approx(a.norm())
    assert found["all"]["angle"] == pytest.approx(angle(a, b))
    assert json.loads(inspect(one, "--json").stdout)["all"]["angle"] is None
    table = inspect(one, "--against", two).stdout
    assert all(name in table for name in a.layers)
    assert "degrees" in table
    refused = inspect(one, "--against", other)
    assert refused.returncode == 4
    assert "no module in common" in refused.stderr


def test_the_command_that_adds(saved, tmp_path):
    config = {"target_modules": ["q_proj"], "r": 4}
    one, two = saved(llama(), config, config)
    total = ["adapter", "add", one, two, "--weights", 0.5, -0.25, "--output"]
    assert run(*total, tmp_path / "sum").returncode == 0
    expected = 0.5 * lorax.read_adapter(one) - 0.25 * lorax.read_adapter(two)
    assert (lorax.read_adapter(tmp_path / "sum") - expected).norm() <= 1e-6 * expected.norm()
    short = run(*total, tmp_path / "short", "--rank", 2)
    assert "lost" in short.stdout
    assert {layer.rank for layer in lorax.read_adapter(tmp_path / "short").layers.values()} == {2}
    assert run(*total, tmp_path / "sum").returncode == 2  # there is something already
    assert run("adapter", "add", one, "--weights", 1, 2, "--output", tmp_path / "x").returncode == 2
    assert not (tmp_path / "x").exists()
