"""Paging on a real GPU. Needs torch, numpy, safetensors, pytest and cuda-bindings alone.

No test takes more than 1 GiB of managed memory, and none starts where less than 4 GiB are free.
"""

import copy
import ctypes
import statistics

import kernel_testing  # noqa: F401  first: it makes lorax.kernels importable on a bare machine
import pytest
import torch
from torch import nn

from lorax.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from lorax.optim.unified_memory import ManagedBlock, cuda_runtime, live_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAIRS = [(AdamW, PagedAdamW), (AdamW8bit, PagedAdamW8bit)]


@pytest.fixture(autouse=True)
def _room():
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2**30:
        pytest.skip(f"{free} bytes of GPU memory are free; 4 GiB wanted")


def lora_parameters(count=450, width=4096, r=16):
    """The matrices of a LoRA on a model 4096 wide: A (r, width) and B (width, r) in turns."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(r, width), (width, r)] * (count // 2)
    return [nn.Parameter(torch.randn(s, device="cuda", generator=generator)) for s in shapes]


def set_gradients(seed, *lists):
    generator = torch.Generator("cuda").manual_seed(seed)
    for parameters in zip(*lists, strict=True):
        gradient = torch.randn(parameters[0].shape, device="cuda", generator=generator)
        for p in parameters:
            p.grad = gradient.clone()


def moment_tensors(optimizer):
    for state in optimizer.state.values():
        yield from (tensor for name, tensor in state.items() if name != "step")


@pytest.mark.parametrize(("_", "kind"), PAIRS)
def test_pointers_are_managed(_, kind):
    ours = lora_parameters(count=6)
    set_gradients(0, ours)
    optimizer = kind(ours)
    optimizer.step()
    runtime = cuda_runtime()
    for tensor in moment_tensors(optimizer):
        assert tensor.is_cuda
        assert runtime.is_managed(tensor.data_ptr())
    assert not runtime.is_managed(ours[0].data_ptr())
    assert optimizer.paging.managed_bytes == live_bytes() > 0


def test_the_cpus_writes_are_seen_and_the_gpus_too():
    block = ManagedBlock(4 * 1024, torch.cuda.current_device())
    tensor = block.tensor(torch.device("cuda")).view(torch.float32)
    assert (tensor == 0).all()
    torch.cuda.synchronize()
    host = (ctypes.c_float * 1024).from_address(block.pointer)
    host[:] = [float(i) for i in range(1024)]
    assert torch.equal(tensor, torch.arange(1024, device="cuda", dtype=torch.float32))
    tensor += 1
    torch.cuda.synchronize()
    assert host[5] == 6.0


@pytest.mark.parametrize(("plain", "kind"), PAIRS)
@pytest.mark.parametrize("write_back", [True, False])
def test_forced_pressure_and_paging_change_no_bit(plain, kind, write_back):
    lists = [lora_parameters() for _ in range(3)]
    optimizers = [
        plain(lists[0], lr=1e-2),
        kind(lists[1], lr=1e-2, write_back=write_back),
        kind(lists[2], lr=1e-2, write_back=write_back, forced_pressure=True),
    ]
    for step in range(10):
        set_gradients(step, *lists)
        for optimizer in optimizers:
            optimizer.step()
    for ps in zip(*lists, strict=True):
        assert torch.equal(ps[0], ps[1])
        assert torch.equal(ps[0], ps[2])
        states = [o.state[p] for o, p in zip(optimizers, ps, strict=True)]
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name])
            assert torch.equal(value, states[2][name])
    held = optimizers[0].state_bytes()
    for optimizer, factor in zip(optimizers[1:], (write_back, 1 + write_back), strict=True):
        torch.cuda.synchronize()
        moved = optimizer.paging
        assert moved.managed_bytes == pytest.approx(held, rel=0.01)
        assert moved.prefetched_in_bytes == 10 * moved.managed_bytes
        assert moved.prefetched_out_bytes == 10 * factor * moved.managed_bytes
        assert moved.waited_seconds >= 0


def test_between_steps_the_gpu_has_its_memory_back():
    """462 MB of states: after a step they are on the host, without writing back on the GPU."""
    free = {}
    for write_back in (False, True):
        ours = [nn.Parameter(torch.randn(3800, 3800, device="cuda")) for _ in range(4)]
        set_gradients(0, ours)
        optimizer = PagedAdamW(ours, write_back=write_back)
        for _ in range(2):
            optimizer.step()
        torch.cuda.synchronize()
        free[write_back], _ = torch.cuda.mem_get_info()
        held = optimizer.state_bytes()
        del optimizer, ours
        torch.cuda.empty_cache()
    assert free[True] - free[False] > held / 2


@pytest.mark.parametrize("kind", [PagedAdamW, AdamW])
def test_200_steps_of_torch_s_operations_against_torch(kind):
    """fused=False runs torch's own CUDA kernels, on flat pages: bit-equal to torch's AdamW."""
    ours = lora_parameters(count=20)
    theirs = copy.deepcopy(ours)
    optimizer = kind(ours, lr=1e-2, fused=False)
    oracle = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for step in range(200):
        set_gradients(step, ours, theirs)
        optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for name, value in oracle.state[q].items():
            assert torch.equal(optimizer.state[p][name], value), name


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
def test_200_steps_of_the_kernel_have_a_cpu_s_moments(kind):
    """The Triton kernel rounds where torch rounds on a CPU: moments, codes and scales are equal."""
    ours = lora_parameters(count=4)
    theirs = [nn.Parameter(p.detach().cpu()) for p in ours]
    optimizer, oracle = kind(ours, lr=1e-2), kind(theirs, lr=1e-2)
    for step in range(200):
        set_gradients(step, ours)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.cpu()
        optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        for name, value in oracle.state[q].items():
            assert torch.equal(optimizer.state[p][name].cpu(), value), name
        torch.testing.assert_close(p.cpu(), q, rtol=200 * 2**-23, atol=200 * 1e-2 * 2**-23)


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
def test_a_step_is_one_launch(kind, monkeypatch):
    """450 tensors fill several pages; without paging one kernel steps them all."""
    from lorax.kernels import adamw

    started = []
    start = adamw.launch
    monkeypatch.setattr(
        adamw, "launch", lambda *a, **o: (started.append(a[0].fn.__name__), start(*a, **o))
    )
    ours = lora_parameters()
    set_gradients(0, ours)
    kind(ours).step()
    assert len(started) == 1


@pytest.mark.parametrize("kind", [PagedAdamW, AdamW])
def test_20_steps_against_torch_on_the_gpu(kind):
    """torch's own CUDA kernels round elsewhere than ours: at most a few ulp in 20 steps."""
    ours = lora_parameters(count=20)
    theirs = copy.deepcopy(ours)
    optimizer, oracle = kind(ours), torch.optim.AdamW(theirs, foreach=False)
    for step in range(20):
        set_gradients(step, ours, theirs)
        optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=20 * 2**-23, atol=1e-8)


def test_state_moves_between_paged_and_ordinary():
    straight = lora_parameters(count=10)
    resumed = copy.deepcopy(straight)
    a, b = AdamW(straight), PagedAdamW(resumed)
    for step in range(10):
        if step == 5:
            saved = {k: copy.deepcopy(v) for k, v in b.state_dict().items()}
            b = AdamW(resumed)
            b.load_state_dict(saved)
        set_gradients(step, straight, resumed)
        a.step()
        b.step()
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_1000_optimizers_leave_no_managed_bytes(kind):
    ours = lora_parameters(count=4)
    set_gradients(0, ours)
    kind(ours).step()
    torch.cuda.synchronize()
    free_before, _ = torch.cuda.mem_get_info()
    for _ in range(1000):
        kind(ours).step()
    torch.cuda.synchronize()
    assert live_bytes() == 0
    free_after, _ = torch.cuda.mem_get_info()
    assert free_before - free_after < 64 * 2**20


def test_step_times_for_450_lora_tensors(capsys):
    """Printed, interleaved medians; the claim that is checked: paging costs what its bytes cost."""
    candidates = {"torch fused": lambda ps: torch.optim.AdamW(ps, fused=True)}
    candidates |= {kind.__name__: kind for pair in PAIRS for kind in pair}
    try:
        import bitsandbytes

        candidates["bitsandbytes PagedAdamW"] = bitsandbytes.optim.PagedAdamW32bit
    except ImportError:
        pass
    lists = {name: lora_parameters() for name in candidates}
    optimizers = {name: make(lists[name]) for name, make in candidates.items()}
    set_gradients(0, *lists.values())
    seconds = {name: [] for name in candidates}
    for _ in range(30):
        for name, optimizer in optimizers.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            optimizer.step()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1000)
    medians = {name: statistics.median(times[5:]) for name, times in seconds.items()}
    with capsys.disabled():
        count = sum(p.numel() for p in lists["AdamW"])
        print(f"\n{torch.cuda.get_device_name()}, 450 tensors, {count:,} parameters")
        for name, median in medians.items():
            print(f"  {name:26} {1e3 * median:8.3f} ms")
    moved = optimizers["PagedAdamW"].paging.managed_bytes
    over_the_bus = 2 * moved / 5e9  # in and out, at a fifth of PCIe 4's rate: a bound, not a goal
    assert medians["PagedAdamW"] < medians["AdamW"] + over_the_bus
