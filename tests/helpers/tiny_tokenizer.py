"""Tokenizers of a few hundred tokens: one byte is one token, so that masks read as text.

The special tokens come first (their ids are their places in SPECIAL), then the 256 bytes.
"""

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from lorax.data.examples import Example
from lorax.data.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer(
    *,
    bos: bool = False,
    eos: str | None = "</s>",
    pad: str | None = None,
    chat_template: str | None = None,
    merges: tuple[tuple[str, str], ...] = (),
) -> Tokenizer:
    """Byte-level BPE as GPT-2's; with `bos`, the tokenizer itself puts <s> before a text."""
    return Tokenizer(
        byte_backend(bos=bos, merges=merges),
        bos_token="<s>" if bos else None,
        eos_token=eos,
        pad_token=pad,
        chat_template=chat_template,
    )


def byte_backend(*, bos: bool = False, merges: tuple[tuple[str, str], ...] = ()) -> Backend:
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return backend


def llama2_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Characters as tokens, with Llama 2's habit of putting a space before a text."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*SPECIAL, "\u2581", *letters]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template)


def said(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The runs of tokens that are trained, as text."""
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(example.ids, example.trained, strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run) for run in runs]
