"""`lorax verify ADAPTER`: an adapter in lorax and in the installed PEFT, independently, compared.

    adapter's files ---- lorax.load_adapter ------------ forward, backward, merge --+
            |                                                                      +--> Report
            +----------- PeftModel.from_pretrained ----- forward, backward, merge --+
                         over transformers (and bitsandbytes)

Both read the same files, each with its own code; the text is Python's own documentation in the
base's tokens. With `reference`, PEFT reads another adapter: what was trained elsewhere.

Both compute in float32. In bfloat16 the two round in other places (PEFT casts the adapter's input
up, lorax the adapter down), which moves gradients by up to 22 % on SmolLM2: a fault would hide.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorax.adapters.attached import adapter_layers
from lorax.adapters.stated import adapter_config
from lorax.adapters.variants import of_file
from lorax.errors import (
    AdapterError,
    FormatError,
    LoraxError,
    UsageError,
)
from lorax.formats.adapter_tokenizer import load_adapter_tokenizer
from lorax.formats.fingerprint import KEY, parse
from lorax.formats.hub import find_model
from lorax.formats.huggingface import as_dtype, open_model_files
from lorax.formats.json_files import read_json
from lorax.formats.peft import load_adapter
from lorax.formats.peft_directory import CONFIG, TENSORS
from lorax.formats.places import Place, as_trained, needed_adapter, stated_base
from lorax.formats.safetensors_files import read_file, read_metadata
from lorax.models import Model
from lorax.parity import causes
from lorax.parity.bases import files_for_transformers, float32_base
from lorax.parity.compare import NESTED_BOUND, compare
from lorax.parity.difference import EXACT, NESTED, difference
from lorax.parity.load_peft import load_peft, peft_versions, require_packages, short_line
from lorax.parity.report import FINGERPRINT, Check, Report
from lorax.parity.rows import batch, random_batch
from lorax.parity.sides import LoraxSide, PeftSide, packed_by_bitsandbytes
from lorax.quant import codebooks
from lorax.quant.double import NestedScales, dequantize_scales
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.linear import QuantizedLinear


def verify(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    against: str = "peft",
    reference: str | os.PathLike[str] | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
    text: str | os.PathLike[str] | None = None,
    tokens: int = 128,
    resize_vocabulary: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Hold lorax against the installed PEFT over one adapter, in float32 on the CPU.

    Args:
        adapter: a PEFT adapter's directory or Hub id, or a run's directory.
        base: the base model, where the adapter's own entry does not lead to it.
        against: "peft".
        reference: another adapter's directory, which PEFT reads in the place of `adapter`, over
            the base that it names (over `base`, if that is given).
        quantization: "nf4", "nf4-dq", "fp4" or "fp4-dq": lorax quantizes the base, bitsandbytes
            does so on its own, the bytes are compared, and both go on with lorax's. None takes
            what the adapter's run has on record, "none" plain weights. A base that is quantized
            already needs either.
        dtype: what the base's weights are rounded to before all that; "auto" takes what the run
            has on record, else what `load_model` makes of it.
        text: a text file; by default docstrings of Python's standard library, or random tokens
            where neither the adapter nor its base has a tokenizer.
        tokens: how many tokens of the text go through both models.
        resize_vocabulary: as in `load_adapter`; transformers resizes PEFT's base.
        say: is told what is being done.

    Raises:
        UsageError: an option that does not exist, no base, or a text of less than two tokens.
        EnvironmentProblem: peft, transformers or bitsandbytes is not installed.
        AdapterError: a variant that cannot be compared.
        FormatError: a file is missing or damaged. An adapter that is only refused, because it has
            a tensor too many or one that is not finite, gives a report that does not hold.
    """
    if against != "peft":
        raise UsageError(f"against {against!r} is unknown; expected peft")
    if tokens < 2:
        raise UsageError(f"tokens is {tokens}; expected at least 2")
    require_packages("peft", "transformers")
    with tempfile.TemporaryDirectory(prefix="lorax-verify-") as folder:
        place = Place(
            directory := _adapter_directory(adapter),
            stated_base(directory) if base is None else os.fspath(base),
        )
        notes: list[str] = []
        dtype, quantization = as_trained(place, dtype, quantization, notes.append)
        job = _Job(place, base is not None, dtype, quantization, Path(folder), say, notes)
        job.resize_vocabulary = resize_vocabulary
        theirs = None if reference is None else _adapter_directory(reference)
        return job.report(theirs, text, tokens)


class _Job:
    """One adapter on one base."""

    def __init__(
        self,
        place: Place,
        base_is_given: bool,
        dtype: str,
        quantization: str | None,
        folder: Path,
        say: Callable[[str], None],
        notes: list[str],
    ):
        shared = codebooks.formats(bitsandbytes=True)
        if quantization is not None and quantization not in shared:
            raise UsageError(
                f"quantization {quantization!r}: verify covers plain and 4-bit bases; expected "
                f"{', '.join(shared)}, or none for the plain weights"
            )
        assert place.adapter is not None
        self.adapter, self.base, self.base_is_given = place.adapter, place.model, base_is_given
        self.dtype = as_dtype(dtype) or open_model_files(self.base).dtype
        self.quantization, self.folder, self.say, self.notes = quantization, folder, say, notes
        self.resize_vocabulary = False
        for note in notes:
            say(note)

    def report(self, reference: Path | None, text: Any, tokens: int) -> Report:
        """Load both sides and compare them, or say why that cannot be."""
        self.say(f"lorax loads {self.base}")
        model = self._base(self.quantization)
        self._check_base(model)
        ids = self._ids(model, text, tokens)
        self.say("finding the base's files for transformers")
        base, note = files_for_transformers(self.base, model, self.quantization, self.folder)
        self.notes += [note] if note else []
        directory = self.adapter
        if reference is not None:
            directory = reference
            if not self.base_is_given and stated_base(reference) != self.base:
                base = find_model(stated_base(reference))
        report = Report(
            adapter=str(self.adapter),
            base=self.base,
            against=peft_versions(),
            quantization=self.quantization,
            tokens=ids.numel(),
            reference=None if reference is None else str(reference),
        )
        try:
            mark = self._load(model)
        except AdapterError as error:
            return self._refused(report, str(error), directory, base, ids)
        if mark:
            home = _tensor_in(mark)
            home = home if home[0] else (_edited_module(model, self.adapter), "")
            report = replace(report, refusals={FINGERPRINT: mark}, refused_tensor=home)
        self.say(f"PEFT loads {directory}")
        try:
            rows = model.config.vocab_size if self.resize_vocabulary else None
            theirs, said = load_peft(directory, base, self.dtype, rows)
        except Exception as error:  # PEFT raises whatever it meets
            reason = f"PEFT does not load it: {type(error).__name__}: {short_line(error)}"
            refusals = report.refusals | {"peft": reason}
            return replace(report, refusals=refusals, notes=self.notes)
        self.notes += said
        self.notes += _ignored(theirs, directory)
        self.say("comparing")
        mine = LoraxSide(model)
        quantizer = self._quantizer_checks(mine)
        checks = compare(mine, theirs, ids, None if reference is not None else self._truth)
        self.notes += _shortened(theirs.notes)
        return replace(report, checks=_before_modules(quantizer, checks), notes=self.notes)

    def _base(self, quantization: str | None) -> Model:
        return float32_base(self.base, self.dtype, quantization)

    def _ids(self, model: Model, text: Any, tokens: int) -> Tensor:
        try:
            tokenizer = load_adapter_tokenizer(self.adapter, self.base)
        except LoraxError as error:
            if text is not None:
                raise
            self.notes.append(f"no tokenizer, so random tokens went through both ({error})")
            return random_batch(model, tokens)
        return batch(tokenizer, model, text, tokens)

    def _load(self, model: Model) -> str:
        """Load the adapter, trainable; what its fingerprint says against that, or ""."""
        resize = {"resize_vocabulary": self.resize_vocabulary}
        try:
            load_adapter(model, self.adapter, trainable=True, **resize)
            return ""
        except AdapterError as error:
            mark = str(error)
        unchecked = {"check_base": False, "check_adapter": False, **resize}
        try:
            load_adapter(model, self.adapter, trainable=True, **unchecked)
        except AdapterError as error:
            raise error if str(error) == mark else AdapterError(f"{mark} {error}") from None
        return mark

    def _truth(self) -> LoraxSide:
        model = self._base(self.quantization)
        resize = {"resize_vocabulary": self.resize_vocabulary}
        load_adapter(model, self.adapter, check_base=False, check_adapter=False, **resize)
        return LoraxSide(model)

    def _check_base(self, model: Model) -> None:
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                if not isinstance(module.quantized, FourBitTensor):
                    raise UsageError(
                        f"{self.base}: {name} is quantized as {module.quantized.format}; verify "
                        "covers plain and 4-bit bases; give the model that was quantized as --base"
                    )
                require_packages("bitsandbytes")

    def _quantizer_checks(self, mine: LoraxSide) -> list[Check]:
        """bitsandbytes quantizes each weight by itself; its bytes and scales against lorax's."""
        if self.quantization is None:
            return []
        self.say("bitsandbytes quantizes the base")
        dense = self._base(None)
        return list(quantizer_checks(mine, dense))

    def _refused(
        self, report: Report, reason: str, directory: Path, base: Path, ids: Tensor
    ) -> Report:
        """What lorax says, and what PEFT does with the same files."""
        self.notes += _notes_on(directory)
        refusals = {"lorax": reason}
        try:
            theirs, said = load_peft(directory, base, self.dtype)
            with torch.no_grad():
                logits = theirs.logits_and_loss(ids)[0]
        except Exception as error:  # PEFT raises whatever it meets
            refusals["peft"] = f"PEFT, too: {type(error).__name__}: {short_line(error)}"
        else:
            finite = "finite" if logits.isfinite().all() else "not finite"
            self.notes.append(f"PEFT loads it{'' if said else ' without a word'}; its logits are "
                              f"{finite}")  # fmt: skip
            self.notes += [*said, *_ignored(theirs, directory)]
        return replace(
            report, refusals=refusals, refused_tensor=_tensor_in(reason), notes=self.notes
        )


def quantizer_checks(mine: LoraxSide, dense: Model) -> Iterator[Check]:
    """bitsandbytes' quantizer on a dense model's weights, against the bytes that lorax has."""
    from bitsandbytes.functional import quantize_4bit

    weights = dict(dense.named_parameters())
    for path, module in mine.modules.items():
        base = mine.base_of(module) if mine.is_adapted(module) else module
        found = mine.packed(base)
        if not found:
            continue
        assert isinstance(base, QuantizedLinear)
        q = base.quantized
        assert isinstance(q, FourBitTensor)
        packed, state = quantize_4bit(
            weights[f"{path}.weight"].detach(),
            blocksize=q.block_size,
            compress_statistics=q.nested is not None,
            quant_type=q.quant_type,
        )
        others = packed_by_bitsandbytes(packed, state)
        for part, other in others.items():
            gap, bound, source, note = difference(found[part], other), 0.0, EXACT, ""
            if part == "scales" and q.nested is not None and not gap.equal:
                count = int((found[part] != other).sum())
                note = causes.NESTED.format(count=count, all=other.numel())
                nested = NestedScales(others["nested scales"], others["nested offset"])
                gap = difference(q.scales(), dequantize_scales(other, nested))
                bound, source = NESTED_BOUND, NESTED
            yield Check(path, "quantizer", part, gap, bound, source, note)


def _before_modules(first: list[Check], checks: list[Check]) -> list[Check]:
    """Put each of the first checks where its module's begin."""
    waiting: dict[str, list[Check]] = {}
    for check in first:
        waiting.setdefault(check.module, []).append(check)
    return [c for check in checks for c in (*waiting.pop(check.module, []), check)]


def _shortened(notes: list[str]) -> list[str]:
    return notes if len(notes) < 2 else [f"{notes[0]} (and so for {len(notes) - 1} more)"]


def _adapter_directory(path: str | os.PathLike[str]) -> Path:
    directory = needed_adapter(path)
    if not (directory / TENSORS).is_file():
        raise FormatError(
            f"{directory}: no {TENSORS}; expected a PEFT adapter directory; get it anew"
        )
    variant = of_file(read_json(directory / CONFIG))
    if variant is not None and variant.no_verify:
        raise AdapterError(f"{directory}: {variant.no_verify}; give another")
    return directory


def _tensor_in(message: str) -> tuple[str, str]:
    """The module and tensor that a message names, if it does."""
    match = re.search(
        r"base_model\.model\.([\w.]+?)\.(lora_[\w.]*\w|[a-z_]+)(?=[\s,;:)]|$)", message
    )
    return (match[1], match[2]) if match else ("", "")


def _edited_module(model: Model, adapter: Path) -> str:
    """The first module whose rank or scale was another in the settings that were saved."""
    config, mark = adapter_config(model), read_metadata(adapter / TENSORS)[KEY]
    found = parse(mark, str(adapter))
    known = {f.name for f in fields(config)}
    then = {k: v for k, v in found["adapter"]["settings"].items() if k in known}
    try:  # format 1 had some settings, later ones have all that are not the default
        saved = replace(config, **then) if found.get("format") == 1 else type(config)(**then)
    except (AdapterError, TypeError):  # whatever somebody wrote there
        return ""
    for name in adapter_layers(model):
        if (saved.rank(name), saved.scaling(name)) != (config.rank(name), config.scaling(name)):
            return name
    return ""


def _notes_on(directory: Path) -> list[str]:
    tensors = read_file(directory / TENSORS)
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    return [f"{causes.NOT_FINITE}: {', '.join(bad[:3])}"] if bad else []


def _ignored(theirs: PeftSide, directory: Path) -> list[str]:
    """The file's tensors that PEFT has no place for."""
    kept = set(theirs.named_tensors())
    extra = [n for n in read_file(directory / TENSORS) if n not in kept]
    extra = [n for n in extra if not n.endswith(".base_layer.weight")]
    return [f"{causes.UNEXPECTED}: {', '.join(extra[:3])}"] if extra else []
