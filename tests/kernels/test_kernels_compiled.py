"""The kernels compiled for GPUs that are not here, with the shapes of Llama-3-8B.

benchmarks/static_cost.py compiles in a process of its own, because this one may have Triton's
interpreter on. Every kernel is reached through its host function, as it is shipped.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from bank_conflicts import wavefronts_a_gather  # noqa: E402

# `make nightly` takes all targets, and all ranks on each
TARGETS = tuple(map(int, os.environ.get("LORAX_TARGETS", "80 90").split()))
RANKS = tuple(map(int, os.environ.get("LORAX_RANKS", "512").split()))
RANK_TARGETS = tuple(map(int, os.environ.get("LORAX_TARGETS", "89").split()))
PRODUCTS = ("product", "dx", "LoRA")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    facts = tmp_path_factory.mktemp("compiled") / "cost.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks/static_cost.py", "--json", facts]
    for option, numbers in (
        ("--targets", TARGETS),
        ("--ranks", RANKS),
        ("--rank-targets", RANK_TARGETS),
    ):
        command += [option, *map(str, numbers)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return json.loads(facts.read_text())


def which(row):
    return f"sm_{row['target']} {row['case']} {row['kernel']}"


def on(rows, start, target=None):
    found = [
        row for row in rows if row["case"].startswith(start) and target in (None, row["target"])
    ]
    assert found, f"no case {start!r}"
    return found


def test_every_kernel_is_compiled_for_every_target(rows):
    for target in TARGETS:
        names = {row["kernel"] for row in rows if row["target"] == target}
        assert names == {
            "_dequantize_kernel",
            "_quantize_kernel",
            "_vector_kernel",
            "_skinny_kernel",
            "_backward_kernel",
            "_down_kernel",
            "_cross_kernel",
            "_softmax_gradient_kernel",
            "_adamw_kernel",
            "_adamw_8bit_kernel",
            "_arrange_kernel",
            "_narrow_kernel",
            "_norm_kernel",
            "_norm_backward_kernel",
            "_rope_kernel",
            "_swiglu_kernel",
            "_swiglu_backward_kernel",
            "_add_dropped_kernel",
            "_group_kernel",
        }


def test_no_register_spills(rows):
    assert [which(row) for row in rows if row["spills"]] == []


def test_a_rank_needs_no_more_than_its_tile(rows):
    """Each kernel with a path, at the largest rank; sm_89 has the least shared memory."""
    for target in RANK_TARGETS:
        for rank in RANKS:
            kernels = {row["kernel"] for row in on(rows, f"r={rank} ", target)}
            assert len(kernels) == 7, kernels


def test_shared_memory_within_the_limit(rows):
    assert [which(row) for row in rows if row["shared_bytes"] > row["shared_limit_bytes"]] == []


def test_tensor_cores_wherever_there_is_a_matrix_product(rows):
    """M = 1 is a vector; everything else that multiplies matrices has M >= 16."""
    products = [
        row for row in rows if row["case"].startswith(PRODUCTS) and "M=1," not in which(row)
    ]
    products = [row for row in products if row["kernel"] != "_vector_kernel"]
    assert len(products) >= 8 * len(TARGETS)
    for row in products:
        both = row["warp_group_products"] + row["warp_products"]
        assert both > 0, which(row)


def test_warp_group_products_on_hopper(rows):
    """wgmma carries the sum over K on sm_90 in every product."""
    products = [
        row
        for row in rows
        if row["target"] == 90
        and row["kernel"] in ("_skinny_kernel", "_backward_kernel", "_down_kernel", "_cross_kernel")
    ]
    assert len(products) >= 14
    for row in products:
        assert row["warp_group_products"] > 0, which(row)
        assert row["warp_products"] == 0, which(row)


def test_packed_weights_are_loaded_16_bytes_at_a_time(rows):
    """As many 16-byte loads as the packed bytes of a turn need, and few narrower ones."""
    readers = [row for row in rows if row["values_a_thread"]]
    assert len(readers) >= 7 * len(TARGETS)
    for row in readers:
        needed = max(1, row["values_a_thread"] // 32)
        assert row["wide_loads"] >= needed, which(row)
    for row in on(rows, "dequantize"):
        assert row["wide_loads"] == row["values_a_thread"] // 32, which(row)


def test_look_ups_meet_no_more_bank_conflicts_than_one_table_has(rows):
    """3.2 wavefronts in a table of 32 bits; one of 64 bits is read by half a warp at a time."""
    looking = [row for row in rows if row["wavefronts_a_gather"]]
    wide_tables = {"_backward_kernel", "_dequantize_kernel", "_group_kernel"}
    kernels = {row["kernel"] for row in looking}
    assert kernels == {"_vector_kernel", "_skinny_kernel", *wide_tables}
    for row in looking:
        wide = row["kernel"] in wide_tables
        assert row["wavefronts_a_gather"] <= (6 if wide else 3.3), which(row)


def test_the_simulation_tells_copies_that_spread_from_copies_that_all_lanes_share():
    """The four copies that the skinny kernel once had: index (place // 4) % 4, 16 places a lane."""

    def gather(copies, places):
        return (
            f"#at = #ttg.blocked<{{sizePerThread = [{places}], threadsPerWarp = [32]}}>\n"
            f"tt.gather %t[%i] : (tensor<{256 * copies}xi32, #b>, tensor<9xi32, #at>) -> tensor"
        )

    assert wavefronts_a_gather(gather(4, 16)) == pytest.approx(6.5, abs=0.2)
    assert wavefronts_a_gather(gather(1, 16)) == pytest.approx(3.2, abs=0.2)
    assert wavefronts_a_gather(gather(32, 4)) == 1


def test_words_are_known_to_be_aligned(rows):
    """The load of the packed words itself, in Triton's own terms: four words a thread."""
    for row in rows:
        if row["values_a_thread"]:
            assert row["packed_vector"] == 4, which(row)


def test_optimizer_states_are_loaded_16_bytes_at_a_time(rows):
    """Four float32 tensors twice a thread, or p and g once beside the 8-bit codes."""
    for row in rows:
        if row["kernel"] == "_adamw_kernel":
            assert row["wide_loads"] == 8, which(row)
        if row["kernel"] == "_adamw_8bit_kernel":
            assert row["wide_loads"] >= 2, which(row)


# Instructions a value of the product for one row, its multiply-adds taken off: Triton 3.9 leaves
# 4.7, Triton 3.6 (which torch 2.11 brings) more. A bound for each, or no GPU machine gets past it.
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
VECTOR_BOUND = 5 if TRITON >= (3, 9) else 6.5


def test_decoding_takes_at_most_6_instructions_a_value_on_hopper(rows):
    """bitsandbytes' Triton path takes 16.6. For M = 1 the product's own FFMAs are not decoding."""
    for row in on(rows, "dequantize", target=90) + on(rows, "product 4096x14336 M=16", target=90):
        assert row["instructions_a_value"] <= 6, which(row)
    for row in on(rows, "product", target=90):
        if row["kernel"] == "_vector_kernel":
            multiplies = row["loop_fused_multiply_adds"] / row["values_a_thread"]
            assert 1 <= multiplies <= 1.2, which(row)
            assert row["instructions_a_value"] - multiplies <= VECTOR_BOUND, which(row)


NARROW_INSTRUCTIONS, NARROW_BARRIERS, NARROW_WAVEFRONTS = 6.0, 2, 1.5


def test_the_product_of_few_rows_decodes_in_registers_on_hopper(rows):
    """No look-up in shared memory at all, so none that meets a bank conflict."""
    found = [row for row in on(rows, "narrow", target=90) if row["kernel"] == "_narrow_kernel"]
    assert len(found) >= 3
    for row in found:
        assert row["instructions_a_value"] <= NARROW_INSTRUCTIONS, which(row)
        assert row["loop_barriers"] <= NARROW_BARRIERS, which(row)
        assert (row["wavefronts_a_gather"] or 0) <= NARROW_WAVEFRONTS, which(row)


def test_no_multiplication_is_fused_with_an_addition_where_bits_count(rows):
    """absmax = map[code] * nested + offset is rounded twice; one FFMA would round once.

    The control is the same kernel with fusing allowed: there the FFMA is to be seen.
    """
    exact = on(rows, "dequantize") + on(rows, "quantize")
    assert all(row["fused_multiply_adds"] == 0 for row in on(rows, "dequantize"))
    assert all(row["mul_add_ptx"] == 0 for row in exact)
    for row in on(rows, "AdamW"):  # lerp and addcmul, asked for: two for each value of a thread
        values = {"_adamw_kernel": 8, "_adamw_8bit_kernel": 4}[row["kernel"]]
        packed = 2 if row["target"] >= 100 else 1  # Blackwell steps two values an instruction
        assert row["mul_add_ptx"] == 2 * values / packed, which(row)
    (control,) = on(rows, "control: contracted")
    assert control["fused_multiply_adds"] > 0


def test_results_are_rounded_to_nearest(rows):
    """What the interpreter gets wrong for bfloat16 and these tests correct there: cvt.rn."""
    for row in rows:
        if row["kernel"] == "_dequantize_kernel" and "fp32" not in row["case"]:
            assert row["rounding_conversions"] > 0, which(row)
