"""tokenizer.model: sentencepiece's own file, for directories that have no tokenizer.json.

It is a protocol buffer with the pieces, their scores and kinds. The merges are not in it: they are
all the ways in which a piece is the sum of two others, the earlier (or better) piece first.
The packages sentencepiece and protobuf read it; both are optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from lorax.errors import EnvironmentProblem, FormatError
from lorax.files import why_unreadable

MAX_BYTES = 64 * 2**20  # a large model's is 5 MB
_MAX_CHARACTERS = 1000  # of a piece; they are cut at every place
_CONTROL, _USER_DEFINED = 3, 4  # sentencepiece's kinds of pieces
_UNIGRAM = 1  # its kind of model; 2 is BPE


@dataclass(frozen=True)
class SentencePieces:
    """What the file holds.

    pieces: with their scores, in the order of their ids.
    added: the control and user-defined pieces.
    defaults: its bos, eos and unk tokens.
    """

    pieces: list[tuple[str, float]]
    added: list[AddedToken]
    defaults: dict[str, str]
    is_unigram: bool
    unk_id: int
    unk_piece: str
    byte_fallback: bool
    charsmap: bytes

    @property
    def vocab(self) -> dict[str, int]:
        """Each piece's id."""
        return {piece: index for index, (piece, _) in enumerate(self.pieces)}


def read_sentencepiece(path: Path) -> SentencePieces:
    """Read tokenizer.model.

    Raises:
        EnvironmentProblem: a package is missing. FormatError: the file is damaged.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise FormatError(f"{path}: {size} bytes; expected at most {MAX_BYTES}; get the file anew")
    try:
        from sentencepiece import sentencepiece_model_pb2 as messages
    except ImportError as error:
        convert = f"AutoTokenizer.from_pretrained({str(path.parent)!r})"
        raise EnvironmentProblem(
            f"{path}: reading it needs sentencepiece and protobuf ({error}); install "
            f"'lorax-finetuning[sentencepiece]', or convert it elsewhere: python -c \"from "
            f'transformers import AutoTokenizer; {convert}.save_pretrained({str(path.parent)!r})"'
        ) from None
    proto: Any = vars(messages)["ModelProto"]()  # protobuf makes the class when it is imported
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise FormatError(
            f"{path}: not a readable sentencepiece model ({why_unreadable(path, error)}); "
            "get the file anew"
        ) from None
    if not proto.pieces or max(len(piece.piece) for piece in proto.pieces) > _MAX_CHARACTERS:
        raise FormatError(
            f"{path}: no pieces, or one of more than {_MAX_CHARACTERS} characters; "
            "get the file anew"
        )
    return _contents(proto)


def merges_of(
    vocab: Mapping[str, int], scores: Mapping[str, float] | None = None
) -> list[tuple[str, str]]:
    """The merges behind a vocabulary: by id, or the best score first."""
    found = []
    for token, rank in (vocab if scores is None else scores).items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        fits = [(vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
        found += [(rank, len(a), len(b), a, b) for _, _, a, b in sorted(fits)]
    found.sort(key=lambda merge: merge[:3], reverse=scores is not None)
    return [(a, b) for *_, a, b in found]


def build_plain(pieces: SentencePieces, added: Mapping[int, AddedToken]) -> Backend:
    """The backend where no class has rules of its own: spaces become U+2581, no more.

    added: tokens that stand in the place of a piece (a placeholder that was given a name).
    """
    vocab = pieces.vocab
    if pieces.is_unigram:
        model: Any = models.Unigram(pieces.pieces, pieces.unk_id, pieces.byte_fallback)
    else:
        merges = merges_of(vocab)
        names = {index: piece for piece, index in vocab.items()}
        for index, token in added.items():
            if index in names and token.content not in vocab:
                vocab[token.content] = vocab.pop(names[index])
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=pieces.unk_piece,
            fuse_unk=True,
            byte_fallback=pieces.byte_fallback,
        )
    backend = Backend(model)
    steps: list[Any] = [normalizers.Replace(" ", "\u2581")]
    if pieces.charsmap:
        steps.insert(0, normalizers.Precompiled(pieces.charsmap))
    backend.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace("\u2581", " ")]
    if pieces.byte_fallback:
        undo += [decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo)
    return backend


def _contents(proto: Any) -> SentencePieces:
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    names = {
        "bos_token": spec.bos_piece or "<s>",
        "eos_token": spec.eos_piece or "</s>",
        "unk_token": spec.unk_piece or "<unk>",
    }
    return SentencePieces(
        pieces=[(piece.piece, piece.score) for piece in proto.pieces],
        added=[
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ],
        defaults={key: names[key] for key, number in ids.items() if number >= 0},
        is_unigram=spec.model_type == _UNIGRAM,
        unk_id=spec.unk_id,
        unk_piece=spec.unk_piece,
        byte_fallback=spec.byte_fallback,
        charsmap=proto.normalizer_spec.precompiled_charsmap,
    )
