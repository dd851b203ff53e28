"""The quantization workbench: its numbers are plain arithmetic's, in table, JSON and plot."""

import json

import pytest
import torch
from command_line import complete_lorax
from oracles import llama

import lorax
from lorax.inspect.quantization import inspect_quantization, measure, plot, totals


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    return folder


def test_a_tensor_s_numbers():
    w = torch.randn(40, 64)
    w[3] *= 5
    found = measure(w, "nf4", 64, "w")
    back = lorax.quantize(w, "nf4").dequantize()
    rows = (back - w).norm(dim=1) / w.norm(dim=1)
    assert found.bits == 4.5
    assert found.mean_error == pytest.approx((back - w).abs().mean().item(), rel=1e-6)
    assert found.relative_rms == pytest.approx(((back - w).norm() / w.norm()).item(), rel=1e-6)
    assert [row for row, _ in found.worst_rows] == rows.topk(3).indices.tolist()
    assert found.worst_rows[0][1] == pytest.approx(rows.max().item())


def test_every_linear_but_the_head_in_every_case(model):
    errors = inspect_quantization(model, ["nf4", "fp4-dq"], [32, 128])
    names = {e.name for e in errors}
    assert len(names) == 21
    assert "lm_head.weight" not in names
    assert len(errors) == 4 * 21
    by_case = {(t.format, t.block_size): t for t in totals(errors)}
    assert by_case["nf4", 32].relative_rms < by_case["nf4", 128].relative_rms
    assert by_case["nf4", 32].bits == 5.0
    for total in by_case.values():
        mine = [e for e in errors if (e.format, e.block_size) == (total.format, total.block_size)]
        assert total.weights == sum(e.weights for e in mine)
        error, size = (sum(getattr(e, k) for e in mine) for k in ("squared_error", "squared_size"))
        assert total.relative_rms == pytest.approx((error / size) ** 0.5)


def test_a_tensor_that_falls_back_is_counted():
    w = torch.randn(64, 64)
    w[::8] *= 1e-3
    (total,) = totals([measure(w, "nf4-dq", 64, "w")])
    assert (total.fallbacks, total.bits) == (1, 4.5)


def test_the_plot_is_a_png(model, tmp_path):
    plot(inspect_quantization(model, ["nf4"], [64]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def lorax_inspect(*arguments):
    return complete_lorax("inspect", "quantization", *arguments)


def test_the_command(model, tmp_path):
    table = lorax_inspect(
        str(model), "--format", "nf4", "nf4-dq", "--plot", str(tmp_path / "p.png")
    )
    assert table.returncode == 0, table.stderr
    assert "nf4-dq" in table.stdout
    assert (tmp_path / "p.png").is_file()
    found = json.loads(lorax_inspect(str(model), "--format", "nf4", "--json").stdout)
    assert len(found["tensors"]) == 21
    assert found["totals"][0]["bits"] == 4.5
    refused = lorax_inspect(str(model), "--format", "nf5")
    assert refused.returncode == 4
    assert "nf5" in refused.stderr
    assert "Traceback" not in refused.stderr
