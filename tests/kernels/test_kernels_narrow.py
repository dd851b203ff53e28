"""The product of 1 to 16 rows for several Linears at once, and how it decodes."""

import random as standard
import re
from dataclasses import replace

import pytest
import torch
from kernel_testing import DEVICE, fp4, make_weight, nf4, random

from lorax.kernels import narrow, nibbles, reference, tuning

HALVES = (torch.bfloat16, torch.float16)


def emulated(text, first, second):
    """What a plane's PTX computes, by the definitions of its few instructions."""
    registers = {"$1": first, "$2": second, "%ctaid.z": 0}

    def value(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    for name, operands in re.findall(r"(\w+)\.[bu]32 ([^;]+);", text):
        to, *rest = [operand.strip() for operand in operands.split(",")]
        if name == "reg":
            continue
        a = [value(operand) for operand in rest]
        if name == "mov":
            result = a[0]
        elif name == "shl":
            result = a[0] << a[1]
        elif name == "shr":
            result = a[0] >> a[1]
        elif name == "and":
            result = a[0] & a[1]
        elif name == "or":
            result = a[0] | a[1]
        elif name == "lop3":
            bits = [(a[0] >> i & 1) * 4 + (a[1] >> i & 1) * 2 + (a[2] >> i & 1) for i in range(32)]
            result = sum((a[3] >> index & 1) << i for i, index in enumerate(bits))
        else:
            assert name == "prmt", name
            source = (a[0] | a[1] << 32).to_bytes(8, "little")
            picks = [a[2] >> 4 * i & 15 for i in range(4)]
            assert all(pick < 8 for pick in picks), "a sign would be repeated"
            result = int.from_bytes(bytes(source[pick] for pick in picks), "little")
        registers[to] = result & 0xFFFFFFFF
    return registers["$0"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("code", [nf4, fp4], ids=["nf4", "fp4"])
def test_the_assembly_decodes_every_code_in_every_place(code, dtype):
    """No interpreter runs it, so its few instructions are run here."""
    values = code().cpu().to(dtype).view(torch.int16).int() & 0xFFFF
    table = nibbles.table_of(code(), dtype)
    words = [0x76543210, 0xFEDCBA98, 0x02468ACE, 0x13579BDF]
    chosen = standard.Random(0)
    words += [chosen.randrange(2**32) for _ in range(12)]
    for nibble in range(8):
        text = nibbles.plane_text(nibble, table)
        for first in words:
            for second in words[:6]:
                codes = [word >> 4 * nibble & 15 for word in (first, second)]
                expected = int(values[codes[0]]) | int(values[codes[1]]) << 16
                assert emulated(text, first, second) == expected, (nibble, hex(first))


def group(guard, rows, K=256, **how):
    weights = [make_weight(guard, (N, K), seed=N, **how) for N in rows]
    first = weights[0]
    return [w._replace(code=first.code, nested_map=first.nested_map) for w in weights]


def path(guard, N, K, r, seed):
    if not r:
        return None
    A, B = random(r, K, seed=seed, scale=0.1), random(N, r, seed=seed + 1)
    return guard.copy(A), guard.copy(B), 0.7


@pytest.fixture
def small_tiles(monkeypatch):
    """In the interpreter, which pays for a tile's whole size; a GPU keeps its own."""
    if DEVICE == "cpu":
        monkeypatch.setitem(tuning._NARROW, 90, replace(tuning.narrow(90), rows=16))
        monkeypatch.setattr(tuning, "splits", lambda gpu, tiles, steps: min(2, steps))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("M", "rows", "ranks", "how"),
    [
        (1, (40, 16, 35), (5, 0, 17), {}),
        (8, (33,), (4,), {"nested": False}),
        (9, (20, 20), (33, 1), {"block_size": 128}),
        (16, (17, 5), (0, 0), {"block_size": 32}),
    ],
)  # fmt: skip
def test_against_float64_beside_the_twin(guard, r9, dtype, M, rows, ranks, how):
    K = 256 if M < 16 else 384
    weights = group(guard, rows, K, **how)
    x = guard.copy(random(M, K, dtype=dtype, seed=1))
    paths = [path(guard, N, K, r, N) for N, r in zip(rows, ranks, strict=True)]
    biases = [guard.copy(random(N, dtype=dtype, seed=N)) if N % 2 else None for N in rows]
    assert narrow.takes(x, weights)
    found = narrow.products(x, weights, biases, paths).split(rows, 1)
    for N, y, weight, bias, low in zip(rows, found, weights, biases, paths, strict=True):
        W = reference.dequantize(weight, torch.empty(weight.shape, device=DEVICE)).double()
        truth = x.double() @ W.t() + (0 if bias is None else bias.double())
        twin_path = None
        if low is not None:
            A, B, scaling = low
            truth += scaling * (x.double() @ A.double().t()) @ B.double().t()
            twin_path = reference.down(x, A), B, scaling
        assert y.shape == (M, N)
        r9.add("y", y, reference.matmul(x, weight, bias, twin_path), truth)


@pytest.mark.usefixtures("small_tiles")
def test_a_row_does_not_depend_on_the_others_and_a_call_repeats(guard):
    weights = group(guard, (24, 8))
    x = guard.copy(random(5, 256, dtype=torch.bfloat16))
    none = [None, None]
    together = narrow.products(x, weights, none, none)
    assert torch.equal(together, narrow.products(x, weights, none, none))
    for m in range(5):
        alone = narrow.products(x[m : m + 1], weights, none, none)
        assert torch.equal(alone[0], together[m])


def test_what_it_does_not_take(guard):
    weights = group(guard, (8, 8))
    x = random(3, 256, dtype=torch.bfloat16)
    assert not narrow.takes(x.float(), weights)
    assert not narrow.takes(random(17, 256, dtype=torch.bfloat16), weights)
    assert not narrow.takes(x[:0], weights)
    ragged = group(guard, (8,), K=192)
    assert not narrow.takes(random(3, 192, dtype=torch.bfloat16), ragged)
