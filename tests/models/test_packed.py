"""Packed documents: each as if it stood alone, in every family, whatever stands beside it."""

import pytest
import torch
from families import KINDS, family
from oracles import gpt2, llama, mistral, peft_model
from torch.nn.attention.flex_attention import create_block_mask

import lorax
from lorax.data.batches import MicroBatch, micro_batches, pack
from lorax.data.examples import Example
from lorax.errors import UnsupportedModel
from lorax.models.flex import block_mask, first_seen, packed_attention
from lorax.models.packed import Documents
from lorax.training.loss import summed_loss
from lorax.training.packing import packs_documents

MAKE = {"llama": llama, "mistral": lambda: mistral(sliding_window=7), "gpt2": gpt2}
FAMILIES = [*MAKE, *KINDS]
LENGTHS = (5, 38, 1, 2, 17, 11)  # below and above windows and "phi3: longrope"'s border
CPU = torch.device("cpu")


def rows(lengths=LENGTHS, vocabulary=97):
    """Documents of these lengths with a prompt and an answer; one of a token has none."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        made.append(Example(ids, [place >= length // 3 for place in range(length)]))
    return made


def alone(model, row):
    """The row's summed loss by transformers, one row at a time."""
    ids = torch.tensor([row.ids])
    labels = torch.where(torch.tensor([row.trained]), ids, -100)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model):
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and "lora_" in name
    }


def apart(found, expected):
    """The largest difference of two sets of gradients, of the whole gradient's norm."""
    assert found.keys() == expected.keys()
    total = sum(g.square().sum() for g in expected.values()).sqrt()
    return max(((found[name] - expected[name]).norm() / total).item() for name in expected)


def step(model, batches):
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        part = summed_loss(model, *batch)
        part.backward()
        loss += part.item()
    return loss, gradients(model)


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """A model with a LoRA whose B is not zero, in lorax and in PEFT."""
    torch.manual_seed(0)
    base = MAKE[request.param]() if request.param in MAKE else family(request.param)
    base.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_fc"] if request.param == "gpt2" else "all-linear"
    theirs = peft_model(base, r=4, target_modules=targets).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "adapter", trainable=True)
    return mine, theirs


def test_packed_loss_and_gradients_are_those_of_single_rows_against_transformers(pair):
    """In one sequence, in several, in another order, and behind checkpoints; 1e-6."""
    mine, theirs = pair
    documents = rows()
    expected_loss = 0.0
    for row in documents:
        if row.tokens:
            loss = alone(theirs, row)
            loss.backward()
            expected_loss += loss.item()
    expected = gradients(theirs)
    single, by_row = step(mine, micro_batches(documents, 1, 0))
    packings = {
        "one": [pack(documents)],
        "reversed": [pack(documents[::-1])],
        "of 40": micro_batches(documents, 9, 0, room=40),
    }
    assert len(packings["of 40"]) == 2
    for name, batches in packings.items():
        loss, found = step(mine, batches)
        assert abs(loss - single) <= 1e-6 * single, name
        assert apart(found, by_row) <= 1e-6, name
        assert abs(loss - expected_loss) <= 2e-6 * expected_loss, name
        assert apart(found, expected) <= 5e-6, name  # transformers' own rounding is in it
    mine.gradient_checkpointing = True
    assert apart(step(mine, packings["one"])[1], by_row) <= 1e-6


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma2", "gemma3_text", "phi3"])
def test_no_document_sees_another(kind, tmp_path):
    """Another first document moves no bit of the hidden states behind the seam."""
    (MAKE[kind]() if kind in MAKE else family(kind)).save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    first, second = (torch.randint(3, 97, (1, 30)) for _ in range(2))
    second[:, 13:] = first[:, 13:]
    with torch.no_grad():
        one, other = (model.hidden_states(ids, Documents([13, 17])) for ids in (first, second))
    assert torch.equal(one[:, 13:], other[:, 13:])
    assert not torch.equal(one[:, :13], other[:, :13])


def test_the_label_at_a_seam_is_never_predicted_from_the_document_before():
    """Even where a row's first token is marked as trained."""
    documents = [Example([5, 6, 7], [True] * 3), Example([8, 9], [True] * 2)]
    batch = pack(documents)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9]]
    assert batch.documents.lengths == (3, 2)
    assert (batch.labels != -100).sum() == sum(row.tokens for row in documents)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_a_tuned_prompt_stands_in_front_of_each_document(kind, tmp_path):
    (MAKE[kind]() if kind in MAKE else family(kind)).save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    lorax.add_adapter(model, lorax.PromptTuningConfig(num_virtual_tokens=3))
    documents = rows()
    prompt = model.body.prefix.prompt_embeddings
    losses, found = [], []
    for batches in (micro_batches(documents, 1, 0), [pack(documents)]):
        model.zero_grad()
        losses.append(sum(summed_loss(model, *batch) for batch in batches))
        losses[-1].backward()
        found.append(prompt.grad.clone())
    assert abs(losses[0] - losses[1]) <= 1e-6 * losses[0]
    assert (found[0] - found[1]).norm() <= 1e-6 * found[0].norm()


def test_a_family_with_an_attention_of_its_own_is_refused_by_name(tmp_path):
    llama().save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    assert packs_documents(model)

    def attention(x, rope, context):
        key, value = context.append(0, x, x)
        return x + key + value

    for layer in model.model.layers:
        layer.self_attn.forward = attention
    assert not packs_documents(model)
    with pytest.raises(UnsupportedModel, match=r"does not keep packed documents apart; set data\."):
        summed_loss(model, *pack(rows()))
    assert torch.isfinite(summed_loss(model, *MicroBatch(*pack(rows())[:2])))  # a plain sequence


SHAPES = [(5,), (128, 128, 256), (300, 7, 1, 129, 40), (640, 200), (1,) * 130]


@pytest.mark.parametrize("lengths", SHAPES, ids=lambda lengths: f"{len(lengths)}")
@pytest.mark.parametrize("window", [None, 3, 128, 200])
def test_the_mask_of_blocks_against_torch(lengths, window):
    """Ours asks the lengths; torch's asks the mask of every pair."""
    documents = Documents(lengths)
    first, T = first_seen(documents, window), sum(lengths)
    ours = block_mask(documents, window, CPU)

    def mask(b, h, q, k):
        return (k <= q) & (k >= first[q.clamp(max=T - 1)])

    theirs = create_block_mask(mask, None, None, T, T, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


def attended(documents, window, cap, device="cpu", dtype=torch.float32):
    """Query, key and value, and what the plain attention of each document makes of them."""
    T = sum(documents.lengths)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, T, 16, device=device, dtype=dtype) for heads in (4, 2, 2)]
    inputs = [x.requires_grad_(device != "cpu") for x in inputs]
    how = {"window": window, "cap": cap, "scale": 0.3}
    with lorax.backend.backend("pytorch"):
        return inputs, how, documents.attend(0, *inputs, **how)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (100, None), (None, 3.0), (9, 2.0)])
def test_flex_attention_is_that_of_each_document(window, cap):
    documents = Documents(SHAPES[2])
    inputs, how, expected = attended(documents, window, cap)
    found = packed_attention(*inputs, documents, **how, compiled=False)
    assert (found - expected).abs().max() <= 2e-6
    again = packed_attention(*inputs, documents, **how, compiled=False)
    assert torch.equal(found, again)
    assert len(documents.masks) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (100, None), (None, 3.0), (9, 2.0)])
@pytest.mark.parametrize("lengths", SHAPES[1:4], ids=lambda lengths: f"{len(lengths)}")
def test_compiled_flex_attention_forward_and_backward_on_cuda(lengths, window, cap, dtype):
    documents = Documents(lengths)
    inputs, how, expected = attended(documents, window, cap, "cuda", dtype)
    seed = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, seed)
    found = documents.attend(0, *inputs, **how)
    assert documents.masks, "it went through flex.py"
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(
        (found, *torch.autograd.grad(found, inputs, seed)), (expected, *wanted), strict=True
    ):
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1)
