"""Two streams, and graphs replayed side by side, share no buffer that a kernel writes.

A CPU has neither, so a fake says which stream is current and whether a graph captures; what runs
beside a product is run in the middle of it. The same on a device, with real streams and graphs,
waits for one.
"""

import gc
from itertools import pairwise

import pytest
import torch
from kernel_testing import DEVICE, make_weight, random

from lorax.kernels import adamw, cross_entropy, dequantize, launch, lora, matmul, quantize

CPU = torch.device("cpu")
MODULES = (adamw, cross_entropy, dequantize, launch, lora, matmul, quantize)


@pytest.fixture
def place(monkeypatch):
    """The fake: place.stream is current, place.captures says whether a graph takes it down."""

    class Place:
        stream, captures = 1, False

    place = Place()
    monkeypatch.setattr(launch, "_stream", lambda device: place.stream)
    monkeypatch.setattr(launch, "capturing", lambda device: place.captures)
    monkeypatch.setattr(launch, "_counters", {})
    return place


@pytest.mark.parametrize("name", ["unfused", "unfused_dx"])
def test_another_stream_s_product_in_the_middle_of_one(guard, monkeypatch, name):
    """Between a weight's decoding and its product, another stream decodes a weight of its own."""
    call = getattr(matmul, name)
    small, large = make_weight(guard, (20, 64), seed=1), make_weight(guard, (40, 128), seed=2)
    x, other = (
        random(5, weight.shape[name == "unfused"], dtype=torch.bfloat16)
        for weight in (small, large)
    )
    call(other, large)  # were there one buffer for both, it would be large enough by now
    expected = call(x, small)
    multiply, running = torch.mm, []

    def interrupted(a, b, out):
        if not running:
            running.append(True)
            call(other, large)
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", interrupted)
    assert torch.equal(call(x, small), expected)
    assert running


def test_nothing_a_kernel_writes_outlives_its_call(guard, place):
    """What a captured graph writes is the graph's; a buffer kept beyond a call may be freed by a
    larger call while the graph still writes it. Only arrival counters stay, by stream."""
    weight = make_weight(guard, (33, 64 * 8))
    x, dy = random(65, 64 * 8, dtype=torch.bfloat16), random(65, 33, dtype=torch.bfloat16)
    A, B = random(4, 64 * 8), random(33, 4)
    for rows in (3, 65):
        y, h = lora.forward(x[:rows], weight, None, A, B, 1.0)
        lora.backward(dy[:rows], x[:rows], h, weight, A, B, 1.0)
    targets = torch.zeros(65, dtype=torch.int64, device=DEVICE)
    cross_entropy.cross_entropy(x, random(9, 64 * 8, dtype=torch.bfloat16), targets)
    del y, h
    gc.collect()
    kept = [
        (module.__name__, name)
        for module in MODULES
        for name, value in vars(module).items()
        if holds_tensors(value)
    ]
    assert kept == [("lorax.kernels.launch", "_counters")]


def holds_tensors(value):
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(value, torch.Tensor) for value in values)


def test_arrival_counters_by_stream(place):
    first = launch.counters(CPU, 10)
    assert launch.counters(CPU, 20) is first
    place.stream = 2
    assert launch.counters(CPU, 10).data_ptr() != first.data_ptr()
    place.stream = 1
    assert launch.counters(CPU, 10) is first


def test_arrival_counters_of_graphs_captured_on_one_stream(place):
    """Each captured launch has its own, zero at each replay, and leaves the stream's alone."""
    outside = launch.counters(CPU, 10)
    place.captures = True
    graphs = [launch.counters(CPU, 10) for _ in range(3)]
    place.captures = False
    everything = sorted([outside, *graphs], key=torch.Tensor.data_ptr)
    for before, after in pairwise(everything):
        assert before.data_ptr() + before.nbytes <= after.data_ptr()
    assert not any(counters.any() for counters in graphs)
    assert launch.counters(CPU, 10) is outside


def test_a_first_call_inside_a_capture_leaves_nothing_for_later(place):
    """Memory made during a capture holds nothing until the graph is replayed."""
    place.captures = True
    launch.counters(CPU, 10)
    assert launch._counters == {}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 512])
def test_two_streams_on_a_device(guard, rows):
    """Split sums (4 rows) and decoded weights (512), each side's bits as alone."""
    weights = [make_weight(guard, (512, 2048), seed=seed) for seed in range(2)]
    x = random(rows, 2048, dtype=torch.bfloat16)
    alone = [matmul.matmul(x, weight) for weight in weights]
    streams = [torch.cuda.Stream() for _ in weights]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for stream, weight in zip(streams, weights, strict=True):
            with torch.cuda.stream(stream):
                found.append(matmul.matmul(x, weight))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, alone))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 512])
def test_graphs_replayed_side_by_side_after_a_larger_call(guard, rows):
    weights = [make_weight(guard, (512, 2048), seed=seed) for seed in range(2)]
    x = random(rows, 2048, dtype=torch.bfloat16)
    alone = [matmul.matmul(x, weight) for weight in weights]
    graphs, found = [], []
    for weight in weights:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            found.append(matmul.matmul(x, weight))
    large = make_weight(guard, (4096, 2048))
    matmul.matmul(random(512, 2048, dtype=torch.bfloat16), large)
    taken = torch.full((2**26,), float("nan"), device=DEVICE)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, alone))
    assert taken.isnan().all()
