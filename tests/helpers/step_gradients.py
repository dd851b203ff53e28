"""A step's loss and its gradients by name, lorax's and PEFT's, and how near they have to be."""

from peft_pairs import trained

from lorax.training.fast.install import accelerated
from lorax.training.loss import summed_loss

GLOBAL_BOUND, WORST_BOUND = 1e-5, 3e-4  # of the gradients' norm; of one tensor's


def mine_of(model, ids, fast=True, labels=None, context=None):
    """The mean loss, and each gradient by its name."""
    labels = ids if labels is None else labels
    model.zero_grad()
    with accelerated(model, fast):
        loss = summed_loss(model, ids, labels, context) / (labels[:, 1:] != -100).sum()
        loss.backward()
    return loss.item(), gradients(model)


def theirs_of(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model):
    found = {name: p.grad for name, p in trained(model).items()}
    return {name: g.float().clone() for name, g in found.items() if g is not None}


def assert_close(mine, theirs):
    (loss, found), (expected_loss, expected) = mine, theirs
    assert abs(loss - expected_loss) / expected_loss < GLOBAL_BOUND
    assert set(found) == set(expected)
    assert distance(found, expected) < GLOBAL_BOUND
    worst = {n: ((found[n] - e).norm() / e.norm()).item() for n, e in expected.items()}
    assert max(worst.values()) < WORST_BOUND, max(worst, key=worst.get)


def distance(found, expected):
    """Of all gradients together, relative."""
    squares = sum((found[n] - e).square().sum() for n, e in expected.items())
    return (squares / sum(e.square().sum() for e in expected.values())).sqrt().item()
