"""A tokenizer as a GGUF file's fields: the inverse of gguf_tokenizer.py.

    tokenizer.ggml.model        gpt2 (byte-level BPE) or llama (sentencepiece's BPE)
    tokenizer.ggml.pre          how a text is cut before the merges, by the name of a family
    tokenizer.ggml.tokens       in the order of their ids; token_type: what each one is
    tokenizer.ggml.merges       "a b", the first one first
    tokenizer.ggml.scores       of sentencepiece's: which piece is made first

llama.cpp keeps a family's name where tokenizer.json has the expressions themselves. So the parts of
the tokenizer are compared with those that lorax builds for each name, and where none fits, the
tokenizer is refused: under a wrong name llama.cpp would cut texts elsewhere without a word.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from tokenizers import Tokenizer as Backend

from lorax.data.tokenizer import Tokenizer
from lorax.errors import UnsupportedModel
from lorax.formats.gguf_tokenizer import (
    CONTROL,
    END_KEYS,
    GPT2_SPLIT,
    PRE_TOKENIZERS,
    SPECIAL,
    USER_DEFINED,
    byte_level,
)
from lorax.formats.sentencepiece_files import merges_of

log = logging.getLogger("lorax")

_NORMAL, _UNKNOWN, _UNUSED, _BYTE = 1, 2, 5, 6  # ggml's other kinds of tokens
_KEEP = "take its Hugging Face directory to a program that reads tokenizer.json"
_SPACE = "\u2581"


def vocabulary_fields(tokenizer: Tokenizer | None, rows: int, where: str) -> dict[str, Any]:
    """The fields of a tokenizer.

    Args:
        rows: of the embedding; ids without a token are filled up with unused ones.
        where: names the file in errors.

    Raises:
        UnsupportedModel: a tokenizer that GGUF has no words for; more tokens than rows.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    state = json.loads(tokenizer.backend.to_str())
    if state["model"]["type"] != "BPE":
        raise UnsupportedModel(
            f"{where}: the tokenizer's model is {state['model']['type']}; byte-level BPE and "
            f"sentencepiece's are written as GGUF; {_KEEP}"
        )
    tokens = _tokens(tokenizer.backend, rows, where)
    pieces = _space_before(state)
    if pieces is None:
        fields = _byte_level_fields(tokenizer.backend, state, where)
    else:
        fields = _sentencepiece_fields(state, tokens, pieces, where)
    fields["tokens"] = tokens
    fields["token_type"] = _kinds(tokenizer, tokens, state)
    fields |= _special_fields(tokenizer, where)
    found = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _tokens(backend: Backend, rows: int, where: str) -> list[str]:
    ids = backend.get_vocab(with_added_tokens=True)
    if max(ids.values()) >= rows:
        raise UnsupportedModel(
            f"{where}: the tokenizer has a token {max(ids.values())}, the model's embedding "
            f"{rows} rows; give the tokenizer that belongs to the model"
        )
    tokens = [f"[PAD{index}]" for index in range(rows)]
    for token, index in ids.items():
        tokens[index] = token
    return tokens


def _kinds(tokenizer: Tokenizer, tokens: list[str], state: dict[str, Any]) -> list[int]:
    added = {token["content"]: token for token in state["added_tokens"]}
    known = tokenizer.backend.get_vocab(with_added_tokens=True)
    strips = [t for t, about in added.items() if about["lstrip"] or about["rstrip"]]
    if strips:
        log.warning("GGUF does not say that %s takes the spaces beside it along", strips[0])

    def kind(token: str) -> int:
        if token not in known:
            return _UNUSED
        if token in added:
            return CONTROL if added[token]["special"] else USER_DEFINED
        is_byte = state["model"]["byte_fallback"] and token in _BYTES
        return _BYTE if is_byte else _NORMAL

    kinds = [kind(token) for token in tokens]
    unknown = tokenizer.unk_token if state["model"]["byte_fallback"] else None
    if unknown is not None and unknown in known:
        kinds[known[unknown]] = _UNKNOWN
    return kinds


_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def _byte_level_fields(backend: Backend, state: dict[str, Any], where: str) -> dict[str, Any]:
    """Of byte-level BPE: the merges, and the family that cuts texts like this one."""
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    if not merges:
        raise UnsupportedModel(f"{where}: the tokenizer has no merges, which GGUF needs; {_KEEP}")
    for family in PRE_TOKENIZERS:
        like = byte_level({}, [], family, where)
        if _cut(json.loads(like.to_str())) == _cut(state):
            break
    else:
        raise UnsupportedModel(
            f"{where}: GGUF has no name, which lorax knows, for how the tokenizer cuts a text "
            f"({json.dumps(state['pre_tokenizer'])[:300]}); {_KEEP}"
        )
    return {"model": "gpt2", "pre": family, "merges": merges}


def _cut(state: dict[str, Any]) -> list[Any]:
    """What happens to a text before the merges, in one form for each way of saying it."""
    steps: list[Any] = [state["normalizer"], state["model"]["ignore_merges"]]
    for step in _flat(state["pre_tokenizer"]):
        kind = step and step["type"]
        if kind == "ByteLevel":
            steps += [("split", GPT2_SPLIT)] if step["use_regex"] else []
            steps.append(("bytes", step["add_prefix_space"]))
        elif kind == "Split" and (step["behavior"], step["invert"]) in _ISOLATING:
            steps.append(("split", step["pattern"].get("Regex")))
        elif kind == "Digits":
            steps.append(("digits", step["individual_digits"]))
        else:
            steps.append(step)
    return steps


_ISOLATING = (("Isolated", False), ("Removed", True), ("Isolated", True))


def _flat(step: dict[str, Any] | None) -> list[Any]:
    if step is None or step["type"] != "Sequence":
        return [step]
    return [part for inner in step["pretokenizers"] for part in _flat(inner)]


def _space_before(state: dict[str, Any]) -> bool | None:
    """Whether sentencepiece's space goes before a text; None: no sentencepiece's tokenizer."""
    if not state["model"]["byte_fallback"]:
        return None
    before, after = state["normalizer"], _flat(state["pre_tokenizer"])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    inner = before["normalizers"] if before and before["type"] == "Sequence" else [before]
    if inner == [prepend, replace] and after == [None]:
        return True
    splits = [{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
               "invert": False}]  # fmt: skip
    if inner == [replace] and after in ([None], splits):
        return False
    if inner == [None] and after[0] and after[0]["type"] == "Metaspace" and not after[0]["split"]:
        return bool(after[0]["prepend_scheme"] != "never")
    return None


def _sentencepiece_fields(
    state: dict[str, Any], tokens: list[str], prefix: bool, where: str
) -> dict[str, Any]:
    """Of sentencepiece's: scores by which llama.cpp makes the merges, and the merges themselves."""
    vocab: dict[str, int] = state["model"]["vocab"]
    if not vocab.keys() >= _BYTES:
        raise UnsupportedModel(
            f"{where}: the tokenizer lacks tokens <0x00> to <0xFF>, which llama.cpp needs for what "
            f"no other token spells; {_KEEP}"
        )
    merges = [(left, right) for left, right in state["model"]["merges"]]
    order = list(dict.fromkeys(left + right for left, right in merges))
    rank = {piece: place for place, piece in enumerate(order)}
    ranks = [rank[left + right] for left, right in merges]
    added = {token["content"] for token in state["added_tokens"]}
    possible = {merge for merge in merges_of(vocab) if "".join(merge) not in added}
    if ranks != sorted(ranks) or not possible <= set(merges):
        raise UnsupportedModel(
            f"{where}: the tokenizer's merges are in an order that no scores give; {_KEEP}"
        )
    return {
        "model": "llama",
        "pre": "default",
        "scores": [-float(rank.get(token, len(order))) for token in tokens],
        "merges": [" ".join(merge) for merge in merges],
        "add_space_prefix": prefix,
    }


def _special_fields(tokenizer: Tokenizer, where: str) -> dict[str, Any]:
    """The ids of the special tokens, and which of them are put around a text."""
    backend = tokenizer.backend
    fields: dict[str, Any] = {}
    for name, key in SPECIAL.items():
        token = getattr(tokenizer, name)
        number = None if token is None else backend.token_to_id(token)
        if number is not None:
            fields[f"{key}_token_id"] = number
    plain, framed = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
    bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id")
    for add_bos, add_eos in ((False, False), (True, False), (False, True), (True, True)):
        if framed == [*([bos] if add_bos else []), *plain, *([eos] if add_eos else [])]:
            break
    else:
        raise UnsupportedModel(
            f"{where}: the tokenizer puts other tokens around a text than bos and eos "
            f"(ids {framed} for 'a'); {_KEEP}"
        )
    fields |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    others = [end for end in tokenizer.end_token_ids if end != eos]
    return fields | dict(zip(END_KEYS, others, strict=False))
