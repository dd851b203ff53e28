"""The GPU suite's model: QLoRA steps, generation, memory and paging at Llama-3-8B's shape.

The weights are random bits, so no file is needed: a four-bit weight is random bytes with scales
around 0.02. Beside lorax stand transformers + PEFT + bitsandbytes with the same shape, rank and
targets where all three can be imported; without them the rows say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rope_theta": 10000.0, "max_position_embeddings": 128,
}  # fmt: skip
RANK = 16
BATCHES = ((1, 2048), (4, 2048))
POLICIES = (True, "selective", False)
Row = dict[str, Any]


class Batch(NamedTuple):
    """As lorax/data/batches.py has it, whose room needs more packages than a bare machine has."""

    input_ids: Tensor
    labels: Tensor
    documents: None = None


def shape_of(tiny: bool) -> dict[str, Any]:
    return TINY if tiny else SHAPE


def random_four_bit(N: int, K: int, device: str) -> Any:
    """A FourBitTensor of random codes with double quantization."""
    from lorax.quant.double import NestedScales
    from lorax.quant.four_bit import FourBitTensor

    blocks = N * K // 64
    packed = torch.randint(256, (N * K // 2,), dtype=torch.uint8, device=device)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
    second = torch.full((-(-blocks // 256),), 0.005, device=device)
    nested = NestedScales(second, torch.tensor(0.02, device=device))
    return FourBitTensor(packed, absmax, torch.Size((N, K)), torch.bfloat16, 64, nested)


def lorax_model(tiny: bool, device: str, dropout: float = 0.1) -> Any:
    """A Llama with four-bit Linears and LoRA on all of them, ready to train."""
    from lorax.adapters.config import LoRAConfig
    from lorax.adapters.inject import add_adapter
    from lorax.models.llama import Llama
    from lorax.models.llama_config import LlamaConfig
    from lorax.quant.linear import QuantizedLinear

    with torch.device("meta"):
        model = Llama(LlamaConfig(**shape_of(tiny)))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, own = name.rpartition(".")
            weight = random_four_bit(module.out_features, module.in_features, device)
            setattr(model.get_submodule(parent), own, QuantizedLinear(weight))
    model = model.to_empty(device=device).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    targets = "all-linear"
    add_adapter(
        model,
        LoRAConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, lora_dropout=dropout),
    )
    return model.train()


def peft_model(tiny: bool) -> Any:
    """The same in transformers + PEFT + bitsandbytes.

    Raises:
        ImportError: one of them is not here. RuntimeError: there is no CUDA device.
    """
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import LlamaConfig, LlamaForCausalLM

    if not torch.cuda.is_available():
        raise RuntimeError("bitsandbytes' side of the step needs a CUDA device")
    config = LlamaConfig(**{k: v for k, v in shape_of(tiny).items() if k != "rope_theta"})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, own = name.rpartition(".")
            W = torch.randn(module.out_features, module.in_features).mul_(0.02).bfloat16()
            made = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            made.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4")
            setattr(model.get_submodule(parent), own, made.to("cuda"))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, own = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            setattr(model.get_submodule(parent), own, nn.Parameter(value.normal_(std=0.02), False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to("cuda")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    how = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**how, target_modules="all-linear")).train()


def batch_of(rows: int, length: int, tiny: bool, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 16) if tiny else (rows, length)
    return torch.randint(shape_of(tiny)["vocab_size"], shape, generator=generator).to(device)


def lorax_step(model: Any, ids: Tensor, optimizer: Any) -> Callable[[], Tensor]:
    """One optimizer step, as the training loop takes it; its loss, on the device."""
    from lorax.optim.clip import clip_later, clips_later
    from lorax.training.loss import summed_loss

    trained = [p for p in model.parameters() if p.requires_grad]
    batch, tokens = Batch(ids, ids), ids[:, 1:].numel()

    def step() -> Tensor:
        graphs = model.step_graphs
        loss = None if graphs is None else graphs.add(batch, tokens)
        if loss is None:
            loss = summed_loss(model, ids, ids) / tokens
            loss.backward()
        if clips_later(optimizer, trained):
            clip_later(optimizer, trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def peft_step(model: Any, ids: Tensor, optimizer: Any) -> Callable[[], Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measured(step: Callable[[], Tensor], tokens: int, device: str, repeats: int) -> Row:
    """Seconds of a step (median), tokens a second, the last loss, and the peak of memory."""
    on_gpu = device == "cuda"
    wait = torch.cuda.synchronize if on_gpu else bool
    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        loss = step()
        wait()
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    finite = bool(loss.isfinite())
    return {
        "seconds": median(times),
        "tokens_a_second": round(tokens / median(times), 1),
        "loss": float(loss),
        "peak_bytes": peak,
        "check": {"ok": finite},
    }


def time_lorax_steps(device: str, tiny: bool) -> Iterator[Row]:
    """Both batches under each policy, with graphs and without; first that they agree."""
    from lorax.optim import AdamW
    from lorax.training.fast.install import accelerated

    model = lorax_model(tiny, device)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    yield {"side": "lorax", "agreement": agreement(model, device, tiny)}
    for rows, length in BATCHES[:1] if tiny else BATCHES:
        for policy in POLICIES:
            ids = batch_of(rows, length, tiny, device)
            model.gradient_checkpointing = policy
            with accelerated(model):
                found = measured(
                    lorax_step(model, ids, optimizer), ids.numel(), device, 2 if tiny else 8
                )
                graphs = model.step_graphs
                found["graphs"] = 0 if graphs is None else len(graphs.graphs)
            yield {"side": "lorax", "rows": rows, "length": length, "recompute": policy, **found}


def agreement(model: Any, device: str, tiny: bool) -> Row:
    """The hand-written step's gradients against the plain path's, without dropout."""
    from lorax.training.fast.install import accelerated
    from lorax.training.loss import summed_loss

    ids, found = batch_of(1, 256, tiny, device), []
    model.eval()
    for fast in (True, False):
        model.gradient_checkpointing = True
        with accelerated(model, fast):
            loss = summed_loss(model, ids, ids) / ids.numel()
            loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    model.train()
    difference = sum((a - b).square().sum() for a, b in zip(*found, strict=True)).sqrt()
    total = sum(b.square().sum() for b in found[1]).sqrt()
    error = float(difference / total)
    return {"gradients": error, "check": {"ok": error < 0.05}}


def time_peft_steps(device: str, tiny: bool) -> Iterator[Row]:
    try:
        model = peft_model(tiny)
    except Exception as error:  # the rival may be missing or fail in its own ways
        yield {"side": "PEFT", "missing": repr(error)}
        return
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for rows, length in BATCHES:
        ids = batch_of(rows, length, tiny, device)
        found = measured(peft_step(model, ids, optimizer), ids.numel(), device, 4)
        yield {"side": "PEFT", "rows": rows, "length": length, "recompute": True, **found}


def time_generation(device: str, tiny: bool) -> Iterator[Row]:
    """Tokens a second, one prompt; greedy, so the same call gives the same tokens."""
    from lorax.inference.batch import stream_rows

    model = lorax_model(tiny, device, dropout=0.0).eval()
    prompt = batch_of(1, 128, tiny, "cpu")[0].tolist()
    count = 4 if tiny else 64

    def run() -> list[int]:
        found = stream_rows(model, (), [prompt], [count])
        return [token for _, token in found if token is not None]

    first, again = run(), run()
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    yield {
        "tokens_a_second": round(count / seconds, 1),
        "check": {"ok": first == again and len(first) == count},
    }


def time_paging(device: str, tiny: bool) -> Iterator[Row]:
    """AdamW's states under pressure: all of the card but 1 GB is taken, the states are larger.

    Managed memory never goes beyond what the card had free before; the parameters are those of the
    optimizer that does not page, bit for bit.
    """
    from lorax.optim import AdamW, PagedAdamW

    width, count = (64, 3) if tiny else (4096, 48)  # 48 x 4096 x 4096 x 8 bytes: 6.4 GB of states
    pressure = None
    results = []
    for kind in (AdamW, PagedAdamW):
        torch.manual_seed(0)
        own = [
            nn.Parameter(torch.randn(width, width, device=device).bfloat16()) for _ in range(count)
        ]
        optimizer = kind(own, lr=1e-3)
        if device == "cuda" and kind is PagedAdamW:
            free = torch.cuda.mem_get_info()[0]
            pressure = torch.empty(max(0, free - 2**30), dtype=torch.uint8, device=device)
        for step in range(2):
            for i, p in enumerate(own):
                generator = torch.Generator(device).manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=generator, device=device).bfloat16()
            optimizer.step()
            for p in own:
                p.grad = None
        results.append([p.detach().cpu() for p in own])
        paging = vars(optimizer.paging) if kind is PagedAdamW else {}
        del optimizer, own
        if device == "cuda":
            torch.cuda.empty_cache()
    equal = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    row = {"paging": paging, "pressure_bytes": 0 if pressure is None else pressure.nbytes}
    yield {**row, "state_bytes": 8 * count * width**2, "check": {"ok": equal}}


def parts(name: str, device: str, tiny: bool) -> Iterator[tuple[str, Any]]:
    """(key, value) of the report, as they are measured."""
    made = {
        "step": time_lorax_steps,
        "peft_step": time_peft_steps,
        "generation": time_generation,
        "paging": time_paging,
    }
    for row in made[name](device, tiny):
        yield name, row
