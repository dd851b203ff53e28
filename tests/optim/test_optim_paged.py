"""Paging without a GPU: the calls that would be made, their order, and who frees what."""

import ctypes
import gc
import types

import pytest
import torch
from torch import nn

from lorax.errors import EnvironmentProblem
from lorax.optim import AdamW, PagedAdamW, PagedAdamW8bit, paged, unified_memory
from lorax.optim.paged import PagedMemory, Pager, PagingCounters
from lorax.optim.unified_memory import HOST, ManagedBlock, Runtime, live_bytes
from lorax.training.optimizers import paging_line


class FakeCuda:
    """cuda.bindings.runtime as far as `Runtime` calls it, on malloc; records the calls."""

    cudaMemAttachGlobal = 1  # noqa: N815
    cudaMemoryAdvise = types.SimpleNamespace(  # noqa: N815
        cudaMemAdviseSetPreferredLocation="preferred", cudaMemAdviseSetAccessedBy="accessed by"
    )
    cudaMemLocationType = types.SimpleNamespace(  # noqa: N815
        cudaMemLocationTypeHost="host", cudaMemLocationTypeDevice="device"
    )
    cudaDeviceAttr = types.SimpleNamespace(cudaDevAttrConcurrentManagedAccess="concurrent")  # noqa: N815

    def __init__(self, concurrent=1):
        self.calls, self.memory, self.concurrent = [], {}, concurrent

    def cudaMemLocation(self):  # noqa: N802
        return types.SimpleNamespace(type=None, id=None)

    def __getattr__(self, name):
        def call(*arguments):
            plain = [
                (a.type, a.id) if isinstance(a, types.SimpleNamespace) else a for a in arguments
            ]
            self.calls.append((name, *plain))
            return (0,)

        return call

    def cudaMallocManaged(self, nbytes, flags):  # noqa: N802
        buffer = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, pointer):  # noqa: N802
        del self.memory[pointer]
        return (0,)

    def cudaDeviceGetAttribute(self, attribute, device):  # noqa: N802
        return 0, self.concurrent


def test_cuda_12_names_places_by_number():
    fake = FakeCuda()
    runtime = Runtime(fake, 12)
    runtime.keep_on_host(4096, 100, 2)
    runtime.prefetch(4096, 100, 2, 77)
    runtime.prefetch(4096, 100, HOST, 77)
    assert fake.calls == [
        ("cudaMemAdvise", 4096, 100, "preferred", -1),
        ("cudaMemAdvise", 4096, 100, "accessed by", 2),
        ("cudaMemPrefetchAsync", 4096, 100, 2, 77),
        ("cudaMemPrefetchAsync", 4096, 100, -1, 77),
    ]


def test_cuda_13_names_places_by_location_and_takes_flags():
    fake = FakeCuda()
    runtime = Runtime(fake, 13)
    runtime.keep_on_host(4096, 100, 2)
    runtime.prefetch(4096, 100, 2, 77)
    runtime.prefetch(4096, 100, HOST, 77)
    assert fake.calls == [
        ("cudaMemAdvise", 4096, 100, "preferred", ("host", 0)),
        ("cudaMemAdvise", 4096, 100, "accessed by", ("device", 2)),
        ("cudaMemPrefetchAsync", 4096, 100, ("device", 2), 0, 77),
        ("cudaMemPrefetchAsync", 4096, 100, ("host", 0), 0, 77),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the calls succeed")
def test_the_installed_cuda_bindings_take_these_calls():
    """Argument types are checked before the driver is asked; without one, each call then fails."""
    pytest.importorskip("cuda.bindings.runtime")
    unified_memory.cuda_runtime.cache_clear()
    runtime = unified_memory.cuda_runtime()
    for call in (
        lambda: runtime.malloc(4096),
        lambda: runtime.keep_on_host(4096, 4096, 0),
        lambda: runtime.prefetch(4096, 4096, 0, 0),
        lambda: runtime.prefetch(4096, 4096, HOST, 0),
        lambda: runtime.can_page(0),
        lambda: runtime.is_managed(4096),
    ):
        with pytest.raises(EnvironmentProblem, match="use adamw"):
            call()


def test_a_block_is_zeroed_counted_and_freed_with_its_last_user():
    fake = FakeCuda()
    before = live_bytes()
    block = ManagedBlock(1000, 0, Runtime(fake, 13))
    assert live_bytes() == before + 1000
    (buffer,) = fake.memory.values()
    assert buffer.raw == bytes(1000)
    interface = block.__cuda_array_interface__
    assert interface["data"] == (block.pointer, False)
    assert interface["shape"] == (1000,)
    user = [block]
    del block
    assert len(fake.memory) == 1
    user.clear()
    assert not fake.memory
    assert live_bytes() == before


def test_1000_blocks_leave_no_managed_bytes():
    fake = FakeCuda()
    gc.disable()
    try:
        for _ in range(1000):
            ManagedBlock(4096, 0, Runtime(fake, 12))
            assert not fake.memory
    finally:
        gc.enable()
    assert live_bytes() == 0


def test_a_gpu_that_cannot_page_is_refused():
    fake = FakeCuda(concurrent=0)
    with pytest.raises(EnvironmentProblem, match="cannot page"):
        ManagedBlock(1000, 0, Runtime(fake, 13))
    assert not fake.memory


class RecordingPager:
    """A `Pager` that writes down what it is asked, and knows pages by their order."""

    def __init__(self, pages):
        self.number = {page.memory.data_ptr(): i for i, page in enumerate(pages)}
        self.log = []

    def bring_in(self, memory):
        self.log.append(f"in {self.number[memory.data_ptr()]}")
        return self.number[memory.data_ptr()]

    def wait_for(self, arrival):
        self.log.append(f"wait {arrival}")

    def send_back(self, memory):
        self.log.append(f"out {self.number[memory.data_ptr()]}")

    def drive_out(self, memories):
        self.log.append(f"all {len(memories)} out")


def walked(**settings):
    ps = [nn.Parameter(torch.zeros(2**17)) for _ in range(6)]
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer = PagedAdamW(ps)
    optimizer.step()
    pages = optimizer._pages
    assert len(pages) == 3
    pager = RecordingPager(pages)
    memory = PagedMemory(**settings)
    memory._pagers[torch.device("cpu")] = pager
    for i, page in enumerate(memory.walk(pages)):
        assert page is pages[i]
        pager.log.append(f"step {i}")
    return ", ".join(pager.log)


def test_one_page_is_prefetched_ahead_and_each_is_written_back():
    log = walked()
    assert log == (
        "in 0, in 1, wait 0, step 0, out 0, in 2, wait 1, step 1, out 1, wait 2, step 2, out 2"
    )


def test_without_writing_back_the_driver_evicts():
    log = walked(write_back=False)
    assert log == "in 0, in 1, wait 0, step 0, in 2, wait 1, step 1, wait 2, step 2"


def test_forced_pressure_drives_all_out_first():
    log = walked(write_back=False, forced_pressure=True)
    assert log.startswith("all 3 out, in 0, in 1, wait 0, step 0")


class FakeEvent:
    """An event 2 ms after the one before it; over as soon as it is asked."""

    clock = 0

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream):
        FakeEvent.clock += 2
        self.at = FakeEvent.clock

    def query(self):
        return True

    def elapsed_time(self, other):
        return other.at - self.at


class FakeStream:
    def __init__(self, device=None):
        self.cuda_stream, self.waited_for = 77, []

    def record_event(self):
        return FakeEvent()

    def wait_event(self, event):
        self.waited_for.append(event)

    def wait_stream(self, stream):
        self.waited_for.append(stream)

    def synchronize(self):
        self.waited_for.append("all")


def test_a_pager_counts_what_it_moves_and_how_long_it_waits(monkeypatch):
    """Three pages of 1,000 bytes, driven out, brought in, stepped, sent back, on fake streams."""
    fake, main = FakeCuda(), FakeStream()
    monkeypatch.setattr(paged, "cuda_runtime", lambda: Runtime(fake, 12))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    counters = PagingCounters()
    pager = Pager(torch.device("cuda", 0), counters)
    pages = [torch.zeros(1000, dtype=torch.uint8) for _ in range(3)]
    pager.drive_out(pages)
    assert counters == PagingCounters(prefetched_out_bytes=3000)
    for page in pages:
        pager.wait_for(pager.bring_in(page))
        pager.send_back(page)
    assert counters == PagingCounters(0, 3000, 6000, pytest.approx(3 * 0.002))
    assert len(main.waited_for) == 3  # the main stream waits for each arrival
    to_gpu = [call for call in fake.calls if call[3] == 0]
    to_host = [call for call in fake.calls if call[3] == HOST]
    assert (len(to_gpu), len(to_host)) == (3, 6)
    assert {call[4] for call in fake.calls} == {77}  # all moves are on the side stream


@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_the_metrics_carry_the_counters_once_something_is_managed(kind, monkeypatch):
    optimizer = kind([nn.Parameter(torch.zeros(4))])
    assert paging_line(optimizer) == {}
    moved = PagingCounters(4096, 8192, 4096, 0.25)
    monkeypatch.setattr(PagedMemory, "counters", lambda memory: moved)
    assert paging_line(optimizer) == {
        "managed_bytes": 4096,
        "prefetched_in_bytes": 8192,
        "prefetched_out_bytes": 4096,
        "waited_seconds": 0.25,
    }
    assert paging_line(AdamW([nn.Parameter(torch.zeros(4))])) == {}


def test_forced_pressure_changes_no_bit_on_ordinary_memory():
    results = []
    for pressure in (False, True):
        p = nn.Parameter(torch.zeros(100))
        optimizer = PagedAdamW([p], forced_pressure=pressure)
        for step in range(5):
            p.grad = torch.full((100,), float(step))
            optimizer.step()
        assert optimizer.paging == PagingCounters()  # nothing is managed, nothing moved
        results.append(p.detach().clone())
    assert torch.equal(*results)
