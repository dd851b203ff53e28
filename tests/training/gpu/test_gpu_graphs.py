"""What stands around a captured step, its capture stubbed: a replay runs the function again."""

import pytest
import torch
from gpu_step import through_twins
from oracles import tokens
from peft_pairs import trained
from step_gradients import assert_close, gradients
from test_gpu_step import small

from lorax.data.batches import MicroBatch
from lorax.models.packed import Documents
from lorax.training.fast.install import accelerated
from lorax.training.gpu import graphs as module
from lorax.training.gpu.graphs import StepGraphs
from lorax.training.processes import Gradients


class Stub:
    """Warms up like CUDA's, and counts."""

    def __init__(self):
        self.captured, self.replayed = 0, 0

    def __call__(self, run):
        for _ in range(2):
            run()
        self.captured += 1

        def replay():
            self.replayed += 1
            run()

        return replay


@pytest.fixture
def stub(monkeypatch):
    through_twins(monkeypatch)
    monkeypatch.setattr(module, "BUCKET", 32)
    return Stub()


def batch(rows=2, length=19, seed=1, untrained=4):
    ids = tokens(rows, length, vocabulary=64, seed=seed)
    labels = ids.clone()
    labels[0, :untrained] = -100
    return MicroBatch(ids, labels)


def eager(model, batches, count=60):
    model.zero_grad()
    with accelerated(model):
        adder = Gradients(model)
        loss = sum(adder.add(b, count, is_last=False) for b in batches)
    return loss.item(), gradients(model)


def graphed(model, batches, stub, count=60):
    model.zero_grad()
    with accelerated(model):
        model.step_graphs = StepGraphs(model, stub)
        adder = Gradients(model)
        loss = sum(adder.add(b, count, is_last=False) for b in batches)
    return loss.item(), gradients(model)


@pytest.mark.parametrize("policy", [False, True, "selective"])
def test_micro_batches_of_several_lengths_against_the_eager_step(policy, stub):
    """Padding to the bucket changes nothing; gradients add up over graphs and are kept whole."""
    model = small("nf4")
    model.gradient_checkpointing = policy
    batches = [batch(2, 19), batch(2, 7, seed=2), batch(1, 30, seed=3), batch(2, 19, seed=4)]
    assert_close(graphed(model, batches, stub), eager(model, batches))
    assert stub.captured == 2, "a graph for two rows and one for one row; all lengths share theirs"
    assert stub.replayed == 4


def test_gradients_start_anew_after_zero_grad_and_keep_what_was_there(stub):
    model = small("nf4")
    one, two = batch(seed=1), batch(seed=2)
    with accelerated(model):
        model.step_graphs = StepGraphs(model, stub)
        adder = Gradients(model)
        adder.add(one, 60, is_last=True)
        model.zero_grad()
        adder.add(two, 60, is_last=True)
        second = gradients(model)
        penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        penalty.backward()  # what else adds to p.grad adds to the buffer
        adder.add(one, 60, is_last=True)
        both = gradients(model)
    loss, expected = eager(model, [two])
    assert_close((loss, second), (loss, expected))
    _, sums = eager(model, [two, one])
    for name, parameter in trained(model).items():
        assert torch.allclose(both[name], sums[name] + 2 * parameter.detach(), atol=1e-5)


def test_a_graph_is_made_again_when_what_it_was_made_from_changes(stub):
    model = small("nf4")
    layer = model.model.layers[0].self_attn.q_proj
    with accelerated(model):
        model.step_graphs = StepGraphs(model, stub)
        add = Gradients(model).add
        for change in (
            lambda: None,
            lambda: setattr(layer, "scaling", 3.0),
            lambda: setattr(model, "gradient_checkpointing", True),
            lambda: model.eval(),
            lambda: setattr(layer.lora_A, "data", layer.lora_A.data.clone()),
        ):
            change()
            add(batch(), 60, is_last=True)
            add(batch(seed=3), 60, is_last=True)
    assert stub.captured == 5


def hook(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)


def train_the_head(model):
    model.lm_head.weight.requires_grad_()


def unknown_layer(model):
    model.model.layers[1].self_attn.q_proj.enabled = False


@pytest.mark.parametrize("change", [hook, train_the_head, unknown_layer], ids=lambda f: f.__name__)
def test_what_is_not_known_goes_the_eager_way(change, stub):
    model = small("nf4")
    change(model)
    found = graphed(model, [batch(), batch(seed=2)], stub)
    assert stub.replayed == 0
    assert_close(found, eager(model, [batch(), batch(seed=2)]))


def test_packed_documents_go_the_eager_way(stub):
    model = small("nf4")
    packed = batch(1, 21)._replace(documents=Documents([8, 3, 10]))
    assert_close(graphed(model, [packed], stub), eager(model, [packed]))
    assert stub.captured == 0


def test_a_capture_that_fails_is_said_once_and_the_run_goes_on(monkeypatch, caplog):
    through_twins(monkeypatch)

    def fails(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = small("nf4")
    found = graphed(model, [batch(), batch(seed=2)], fails)
    assert_close(found, eager(model, [batch(), batch(seed=2)]))
    assert [r.message for r in caplog.records if "CUDA graph" in r.message] == [
        "steps are computed without a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_no_more_graphs_than_the_most(stub, monkeypatch):
    monkeypatch.setattr(module, "BUCKET", 2)
    monkeypatch.setattr(module, "MOST", 2)
    model = small("nf4")
    batches = [batch(1, 2 * n, untrained=1) for n in range(1, 5)]
    assert_close(graphed(model, batches, stub), eager(model, batches))
    assert stub.captured == 2
    assert stub.replayed == 2


def test_each_replay_has_its_own_dropout(stub):
    model = small("nf4", dropout=0.4)
    with accelerated(model):
        model.step_graphs = StepGraphs(model, stub)
        add = Gradients(model).add
        torch.manual_seed(3)
        losses = [add(batch(), 60, is_last=True).item() for _ in range(2)]
        torch.manual_seed(3)
        again = [add(batch(), 60, is_last=True).item() for _ in range(2)]
    assert losses[0] != losses[1]
    assert losses == again


def test_buckets_are_whole():
    sizes = {1: 128, 128: 128, 129: 256, 2048: 2048}
    assert {length: module._bucket(length) for length in sizes} == sizes


def test_without_cuda_there_are_none():
    model = small()
    with accelerated(model):
        assert model.step_graphs is None
    assert not hasattr(model, "step_graphs")
