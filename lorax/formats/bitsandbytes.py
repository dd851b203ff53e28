"""A model directory whose Linears bitsandbytes has quantized, as transformers saves it.

config.json says that it is one (`quantization_config`, with `quant_method` "bitsandbytes" and
`load_in_4bit` or `load_in_8bit`). Each quantized Linear P is then several tensors:

    4 bits   P.weight  P.weight.absmax  P.weight.quant_map  P.weight.quant_state.bitsandbytes__nf4
             and, doubly quantized,  P.weight.nested_absmax  P.weight.nested_quant_map
    8 bits   P.weight  P.SCB  P.weight_format

Which Linears are quantized is read from the tensors, not from the config: `llm_int8_skip_modules`
holds patterns whose meaning has changed between versions of transformers, and a Linear without
these companions is simply not quantized.

GPT-2's Conv1D, (in, out) in a plain file, is (out, in) here: transformers transposes it before
quantizing, and not again when it loads. So a quantized weight is never transposed, and a plain one
beside it is.

bitsandbytes decodes a weight straight to the dtype that `bnb_4bit_compute_dtype` names (float32 if
nobody says otherwise), multiplies in it, and rounds the product to the model's dtype. lorax decodes
to the model's dtype and multiplies in that; `load_model(path, "float32")` decodes to float32. What
lorax writes names the model's dtype there, so that both do the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorax.errors import FormatError, QuantizationError, UnsupportedModel, UsageError
from lorax.formats.safetensors_files import TensorFiles
from lorax.quant import names
from lorax.quant.linear import QuantizedLinear
from lorax.quant.quantize import QuantizedTensor

FORMATS = names.bitsandbytes_formats()
_COMPANION = re.compile(
    r"(?P<module>.+)\.(?P<part>weight\.(absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__\w+)|SCB|weight_format)"
)


def stored_bits(found: Mapping[str, Any], where: str) -> int | None:
    """How many bits config.json says the Linears have: 4, 8, or None for a plain checkpoint.

    Raises:
        UnsupportedModel: quantized by another method, which is named.
    """
    settings = found.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise FormatError(
            f"{where}: quantization_config must be an object, found {settings!r}; "
            "mend it there, or get the file anew"
        )
    bits = [b for b in (4, 8) if settings.get(f"load_in_{b}bit", settings.get(f"_load_in_{b}bit"))]
    method = settings.get("quant_method", "bitsandbytes" if bits else None)
    if method != "bitsandbytes":
        raise UnsupportedModel(
            f"{where}: a checkpoint quantized by {method!r}; lorax reads bitsandbytes', or load "
            "the original and pass quantization="
        )
    if len(bits) != 1:
        raise UnsupportedModel(
            f"{where}: quantization_config of bitsandbytes with "
            f"{'both' if bits else 'neither'} load_in_4bit and load_in_8bit; expected one of them"
        )
    return bits[0]


class QuantizedFiles:
    """A checkpoint's tensors, the companions of each quantized weight gathered under its name."""

    def __init__(self, files: TensorFiles, bits: int):
        self._files = files
        self._bits = bits
        self._companions: dict[str, dict[str, str]] = {}  # weight's name -> part -> tensor's name
        for name in files.names:
            match = _COMPANION.fullmatch(name)
            if match:
                weight = f"{match['module']}.weight"
                self._companions.setdefault(weight, {})[match["part"]] = name
        for weight, parts in self._companions.items():
            if weight not in files.home:
                raise FormatError(
                    f"{min(parts.values())}: the weight that it belongs to, {weight}, is missing; "
                    "get the files anew, or save the model again"
                )

    @property
    def names(self) -> list[str]:
        """All tensors' names but the companions'."""
        return [name for name in self._files.names if not _COMPANION.fullmatch(name)]

    def parts(self, name: str) -> dict[str, str]:
        """The companions of a quantized weight: part ("weight.absmax", ...) -> tensor's name."""
        return self._companions.get(name, {})

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._files.read(name)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it."""
        return self._files.dtype(name)

    def read_linear(
        self, name: str, module: nn.Module, dtype: torch.dtype
    ) -> QuantizedTensor | None:
        """The quantized weight of that name for `module`; None where it is stored plain.

        dtype: what an 8-bit weight is decoded to; a 4-bit one says so itself.

        Raises:
            FormatError: the module is no Linear, or has another shape. QuantizationError: a tensor
                is missing, damaged, or holds a scale that is not finite.
        """
        parts = self._companions.get(name)
        if parts is None:
            return None
        if not isinstance(module, nn.Linear):
            raise FormatError(
                f"{name} is quantized; expected the plain weight of a {type(module).__name__}; "
                "get config.json and tensors from one save"
            )
        # Copies, for what is read is the mapped file itself, which may change or go away later.
        tensors = {part: self.read(full).clone() for part, full in parts.items()}
        tensors["weight"] = self.read(name).clone()
        try:
            weight = self._decode(tensors, dtype)
        except QuantizationError as error:
            raise QuantizationError(_full_name(str(error), name)) from None
        if weight.shape != (module.out_features, module.in_features):
            raise FormatError(
                f"{name}: quantized from {tuple(weight.shape)}; "
                f"expected {(module.out_features, module.in_features)}, which is (out, in); "
                "get config.json and tensors from one save"
            )
        return weight

    def _decode(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> QuantizedTensor:
        eight = "SCB" in tensors or "weight_format" in tensors
        if eight != (self._bits == 8):
            found = "8 bits" if eight else "4 bits"
            raise QuantizationError(
                f"weight: in {found}, but config.json says {self._bits}; "
                "get config.json and tensors from one save"
            )
        _check_scales(tensors)
        weight = QuantizedTensor.from_bitsandbytes(tensors, dtype)
        extra = sorted(set(tensors) - set(weight.to_bitsandbytes()))
        if extra:
            raise QuantizationError(
                f"{extra[0]}: not expected with format {weight.format}; get the file anew, or save "
                "the model again"
            )
        return weight


def _check_scales(tensors: Mapping[str, Tensor]) -> None:
    """A damaged scale would spoil its block in silence: refuse what no quantizer writes."""
    for name in ("weight.absmax", "weight.nested_absmax", "SCB"):
        scales = tensors.get(name)
        if scales is None or scales.dtype != torch.float32:
            continue  # bytes of double quantization, or a wrong dtype, which is found later
        bad = (~(scales.isfinite() & (scales >= 0))).flatten().nonzero()
        if len(bad):
            first = int(bad[0])
            raise QuantizationError(
                f"{name}: {len(bad)} of {scales.numel()} scales are negative or not finite, the "
                f"first at [{first}] ({scales.flatten()[first].item()}); get the file anew, or "
                "save the model again"
            )


def _full_name(message: str, weight: str) -> str:
    """Put the module's path before the tensor's name with which the message begins."""
    module = weight.removesuffix("weight")
    return module + message if message.startswith(("weight", "SCB")) else f"{weight}: {message}"


def stored_format(linears: Mapping[str, nn.Module]) -> set[str]:
    """The formats of a model's quantized Linears; empty where it is plain.

    Raises:
        UsageError: bitsandbytes' files cannot hold them, or not together.
    """
    found = {name: m.quantized for name, m in linears.items() if isinstance(m, QuantizedLinear)}
    for name, weight in found.items():
        if weight.format not in FORMATS:
            raise UsageError(
                f"{name} is quantized as {weight.format}, which bitsandbytes' checkpoints do not "
                f"have; expected {names.listed(FORMATS)}. Save the model without quantizing it, "
                f"and load it with quantization={weight.format!r}"
            )
    formats = {weight.format for weight in found.values()}
    if "int8" in formats and len(formats) > 1:
        raise UsageError(
            f"the model mixes {sorted(formats)}; a checkpoint is in 4 bits or in 8, not in both; "
            "load the model with one quantization, and save that"
        )
    return formats


def quantization_config(
    formats: Collection[str], plain: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    """What config.json says of such a model, in the keys that transformers writes.

    Args:
        formats: of the quantized Linears, as `stored_format` gives them. A model with some "nf4"
            among "nf4-dq" counts as doubly quantized: each tensor's own state tells its form.
        plain: the paths of the Linears that are not quantized. The head alone is the default.
        dtype: the model's.
    """
    eight = "int8" in formats
    kinds = sorted({name.removesuffix("-dq") for name in formats})
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_quant_type": "fp4" if eight else kinds[-1],
        "bnb_4bit_use_double_quant": any(name.endswith("-dq") for name in formats),
        "bnb_4bit_compute_dtype": "float32" if eight else str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if plain == ["lm_head"] else plain,
        "llm_int8_threshold": 6.0,
    }
