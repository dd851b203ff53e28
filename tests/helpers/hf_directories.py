"""Model directories as people have them: architecture x tokenizer x the dialect of their files.

Weights, config and tokenizer come from transformers. The two older dialects are what its earlier
versions wrote, or what people keep in a repository: the same files with other keys.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB = 320
TEXT = ["The sea is wide and the sky is blue. What is a boat? It is a vessel."] * 20
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + ']' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NO_LIMIT = 10**30  # transformers' model_max_length where nobody has set one


@dataclass(frozen=True)
class Cell:
    """One kind of directory."""

    architecture: str
    tokenizer: str
    dialect: str

    def __str__(self) -> str:
        return f"{self.architecture}-{self.tokenizer}-{self.dialect}"


# Which tokenizers people have beside which architecture.
TABLE = {
    "llama": ("bytes", "LlamaTokenizer", "GPT2Tokenizer", "metaspace"),  # Llama 3, 2, SmolLM2, ...
    "mistral": ("bytes", "LlamaTokenizer", "metaspace"),
    "gpt2": ("bytes", "GPT2Tokenizer"),
}
DIALECTS = {  # and the dtype of the weights
    "transformers5": torch.bfloat16,
    "old": torch.float16,
    "minimal": torch.float32,
}
CELLS = [
    Cell(architecture, tokenizer, dialect)
    for architecture, tokenizers in TABLE.items()
    for tokenizer in tokenizers
    for dialect in DIALECTS
]
# The other families beside their own tokenizers, one dialect each.
FAMILIES = [
    Cell("qwen2", "Qwen2Tokenizer", "transformers5"),
    Cell("qwen3", "Qwen2Tokenizer", "minimal"),
    Cell("gemma2", "GemmaTokenizer", "old"),
    Cell("gemma3_text", "GemmaTokenizer", "transformers5"),
    Cell("phi3", "LlamaTokenizer", "old"),
]
CELLS += FAMILIES


def build(cell: Cell, directory: Path) -> None:
    """Write the cell's directory."""
    model = random_model(cell)
    model.to(DIALECTS[cell.dialect]).save_pretrained(directory)
    tokenizer = new_tokenizer(cell.tokenizer, old=cell.dialect == "old")
    if cell.dialect != "minimal":
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    if cell.dialect == "old":
        _make_old(directory, cell)
    elif cell.dialect == "minimal":
        _make_minimal(directory, model.config)


def random_model(cell: Cell) -> Any:
    """A random model all of whose parts move the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_config(cell))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) / 10)
    return model


def _config(cell: Cell) -> Any:
    """Tiny sizes; in the minimal dialect the class's own defaults wherever they stay tiny."""
    minimal = cell.dialect == "minimal"
    if cell.architecture == "gpt2":
        sizes = {"n_embd": 48} if minimal else {"n_embd": 32, "n_head": 4, "n_positions": 256}
        return transformers.GPT2Config(vocab_size=VOCAB, n_layer=2, **_ends(cell), **sizes)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    if minimal:  # 32 heads; and 8 key heads for Mistral
        sizes |= {"head_dim": 4}
    else:
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if cell.architecture == "mistral":
        window = None if cell.dialect == "transformers5" else 4096
        return transformers.MistralConfig(vocab_size=VOCAB, sliding_window=window, **sizes)
    if cell in FAMILIES:
        sizes |= {"head_dim": 8, "max_position_embeddings": 256, **_ends(cell)}
        windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
        sizes |= windows if cell.architecture in ("qwen2", "gemma2", "gemma3_text") else {}
        sizes |= {"pad_token_id": 0} if cell.architecture == "phi3" else {}  # else 32000
        return transformers.AutoConfig.for_model(cell.architecture, vocab_size=VOCAB, **sizes)
    if not minimal:
        sizes |= {"max_position_embeddings": 256}
        sizes["tie_word_embeddings"] = cell.dialect == "transformers5"
        sizes["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    return transformers.LlamaConfig(vocab_size=VOCAB, **_ends(cell), **sizes)


def _ends(cell: Cell) -> dict[str, int]:
    """Where the model's texts begin and end, by the tokenizer's ids; minimal: the class's own."""
    if cell.dialect == "minimal":
        return {}
    tokenizer = new_tokenizer(cell.tokenizer)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def new_tokenizer(kind: str, old: bool = False) -> Any:
    """A tokenizer of some 300 tokens, of one of transformers' classes."""
    if kind == "bytes":
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=_with_bos(_byte_backend("<s>", "</s>")),
            bos_token="<s>",
            eos_token="</s>",
        )
    if kind == "GPT2Tokenizer":
        return transformers.GPT2TokenizerFast(**_vocabulary(_byte_backend("<|endoftext|>")))
    if kind == "Qwen2Tokenizer":
        return transformers.Qwen2TokenizerFast(**_vocabulary(_byte_backend("<|endoftext|>")))
    if kind == "GemmaTokenizer":
        backend = _metaspace_backend("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
        return transformers.GemmaTokenizerFast(**_vocabulary(backend))
    backend = _metaspace_backend()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "metaspace" or old:  # transformers 4 wrote the rules into tokenizer.json
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    return transformers.LlamaTokenizerFast(**_vocabulary(backend), add_bos_token=True, **names)


def _byte_backend(*specials: str) -> Backend:
    """GPT-2's and Llama 3's: bytes, no unknown token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(backend, list(specials), initial_alphabet=alphabet)
    return backend


def _metaspace_backend(*specials: str) -> Backend:
    """Llama 2's, as its tokenizer.json says it: a space before the text, bytes for the rest."""
    specials = specials or ("<unk>", "<s>", "</s>")
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # keeps the pieces within words
    _train(backend, [*specials, *(f"<0x{byte:02X}>" for byte in range(256))])
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][: len(specials)]  # the bytes are pieces as others
    backend = Backend.from_str(json.dumps(state | {"pre_tokenizer": None}))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(content=" ", left=1)])
    return _with_bos(backend) if "<s>" in specials else backend


def _with_bos(backend: Backend) -> Backend:
    """Every text gets a <s> before it."""
    bos = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return backend


def _train(backend: Backend, specials: list[str], **options: Any) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 4, special_tokens=specials, show_progress=False, **options
    )
    backend.train_from_iterator(TEXT, trainer)


def _vocabulary(backend: Backend) -> dict[str, Any]:
    found = json.loads(backend.to_str())["model"]
    return {"vocab": found["vocab"], "merges": [tuple(merge) for merge in found["merges"]]}


def _make_old(directory: Path, cell: Cell) -> None:
    """What transformers 4 wrote, and the Hub's first GPT-2: other keys, names without prefix."""
    config = read(directory / "config.json")
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.31.0"}
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        config.pop("layer_types", None)
        if cell.architecture in ("llama", "mistral"):
            del config["head_dim"]
    else:
        config["n_ctx"] = config["n_positions"]
        _drop_the_prefix(directory / "model.safetensors", config["n_layer"])
    write(directory / "config.json", config)
    _make_old_tokenizer(directory, cell.tokenizer)


def _drop_the_prefix(file: Path, layers: int) -> None:
    """GPT-2's tensors as the Hub has them: no "transformer.", and masks beside the weights."""
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    mask = torch.ones(1, 1, 256, 256).tril()
    tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(layers)}
    save_file(tensors, file, {"format": "pt"})


def _make_old_tokenizer(directory: Path, kind: str) -> None:
    """The special tokens in special_tokens_map.json alone, the template in the config."""
    config = read(directory / "tokenizer_config.json")
    keys = [key for key in config if key.endswith("_token")]
    names = {key: name for key in keys if (name := config.pop(key)) is not None}
    template = directory / "chat_template.jinja"
    config |= {"model_max_length": NO_LIMIT, "chat_template": template.read_text()}
    template.unlink()
    is_named = kind in ("LlamaTokenizer", "GPT2Tokenizer", "GemmaTokenizer")
    config["tokenizer_class"] = kind if is_named else "PreTrainedTokenizerFast"
    if kind == "LlamaTokenizer":
        config |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    config.pop("backend", None)
    write(directory / "tokenizer_config.json", config)
    write(directory / "special_tokens_map.json", names)


def _make_minimal(directory: Path, config: Any) -> None:
    """Only what differs from the class's defaults; nothing of dtype, nothing of generation."""
    defaults = type(config)().to_dict()
    left_out = ("dtype", "architectures", "transformers_version")
    values = {
        key: value
        for key, value in config.to_dict().items()
        if key not in left_out and value != defaults.get(key)
    }
    write(directory / "config.json", {"model_type": config.model_type, **values})
    (directory / "generation_config.json").unlink()


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
