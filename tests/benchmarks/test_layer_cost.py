"""What a layer of the hand-written step launches, moves and costs the host: its bounds."""

import sys
from pathlib import Path

import kernel_testing  # noqa: F401  first: it mends the interpreter
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import layer_cost

FORWARD, BACKWARD = 30, 70  # launches


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("keep", [True, "selective", False])
def test_launches_and_bytes_of_a_layer(keep, dropout):
    forward, backward = layer_cost.passes(layer_cost.SHAPE, keep, dropout, 2048)
    counted = [[name for name, _, _ in part.launches] for part in (forward, backward)]
    assert len(counted[0]) <= FORWARD, counted[0]
    assert len(counted[1]) <= BACKWARD, counted[1]
    decodes = [names.count("_group_kernel") for names in counted]
    assert decodes == [4, 7 if keep is True else 4], "down_proj is not computed again"
    assert forward.bytes + backward.bytes < (6.6e9 if keep is True else 5e9)


def test_every_kernel_of_the_step_is_counted():
    forward, backward = layer_cost.passes(layer_cost.SHAPE, True, 0.1, 256)
    names = {name for part in (forward, backward) for name, _, _ in part.launches}
    assert names >= {
        "_norm_kernel", "_norm_backward_kernel", "_rope_kernel", "_swiglu_kernel",
        "_swiglu_backward_kernel", "_group_kernel", "_down_kernel", "_cross_kernel",
        "_add_dropped_kernel", "mm.default", "attention", "attention backward",
    }  # fmt: skip


def test_the_estimate_is_above_what_the_products_alone_take():
    parts = layer_cost.estimate(True)
    assert parts["in all"] == pytest.approx(sum(v for k, v in parts.items() if k != "in all"))
    assert parts["in all"] > 97
