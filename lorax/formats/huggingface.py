"""Models and tokenizers from a directory, the Hub or a .gguf file; models back into a directory.

A model is built without memory first (on torch's meta device); then its tensors are read one at a
time, cast, quantized where that is asked for, and put in place. So the peak is the finished model
plus one tensor. What bitsandbytes has quantized already stays in its few bits
(`lorax.formats.bitsandbytes`).
"""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorax.adapters.layer import AdapterLayer
from lorax.data.tokenizer import Tokenizer
from lorax.errors import (
    EnvironmentProblem,
    FormatError,
    QuantizationError,
    UsageError,
)
from lorax.formats import bitsandbytes, gguf_files, tokenizer_files
from lorax.formats.beside import copy_generation, copy_papers
from lorax.formats.directory import written_directory
from lorax.formats.hub import find_model
from lorax.formats.instead import instead_of_model
from lorax.formats.json_files import read_json
from lorax.formats.model_config import DTYPES, new_model, read_config, stated_dtype
from lorax.formats.read_ahead import read_ahead
from lorax.formats.safetensors_files import (
    FLOATS,
    MAX_SHARD_BYTES,
    open_checkpoint,
    write_checkpoint,
)
from lorax.formats.written_config import is_tied, write_config
from lorax.models import Model
from lorax.models.origin import Origin
from lorax.models.replace import replace_module
from lorax.quant.linear import QuantizedLinear
from lorax.quant.quantize import check_request, quantize
from lorax.quant.tensor import QuantizedTensor

# Buffers that old checkpoints carry beside the weights.
_NO_WEIGHTS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


class TensorSource(Protocol):
    """Where a model's tensors come from."""

    @property
    def names(self) -> list[str]:
        """The tensors' names."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, without reading it."""


def load_model(
    path: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    *,
    revision: str | None = None,
) -> Model:
    """Load a model, frozen and in eval mode; quantized, if its files are.

    Args:
        path: a model directory in Hugging Face's layout, a `.gguf` file, or a Hub id.
        dtype: "auto" (what config.json says, else the file's own), a name like "bfloat16", or a
            torch.dtype: what the weights are cast to, before any quantization.
        device: where the model lives.
        quantization: None, or a format of `lorax.quant.quantize` ("nf4-dq", "int8", ...): for the
            weight of every Linear but `lm_head`. A checkpoint in bitsandbytes' 4 or 8 bits needs
            None: it stays as it is.
        revision: branch, tag or commit on the Hub.

    Raises:
        UnsupportedModel: an architecture or option that lorax does not cover, by name.
        FormatError: a damaged or incomplete checkpoint, with the file and the tensor.
        UsageError: an unknown dtype, device or quantization; EnvironmentProblem: no such path,
            id or device.
    """
    if quantization is not None:
        try:
            check_request(quantization, name="quantization")
        except QuantizationError as error:
            raise UsageError(str(error)) from None
    wanted, device = as_dtype(dtype), as_device(device)
    files = open_model_files(path, revision)
    if quantization and isinstance(files.source, bitsandbytes.QuantizedFiles):
        raise UsageError(
            f"{files.where}: is quantized by bitsandbytes already and loads as it is; "
            f"leave quantization={quantization!r} out"
        )
    _fill(files, wanted or files.dtype, device, quantization)
    files.model.name_or_path = os.path.expanduser(path)
    files.model.loaded_from = files.where.resolve()
    return files.model


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, opened: the model on the meta device, and where its tensors are.

    config is config.json's content (None for .gguf); names go from the model's to the source's.
    """

    where: Path
    config: dict[str, Any] | None
    model: Model
    source: TensorSource
    names: dict[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says, else the embedding's."""
        stated = None if self.config is None else stated_dtype(self.config)
        return stated or self.source.dtype(self.names[self.model.embedding_name])

    @property
    def is_mapped(self) -> bool:
        """Whether what is read may lie in the file's own pages."""
        return not isinstance(self.source, gguf_files.GGUFFile)

    def read(self, mine: str) -> Tensor:
        """A plain tensor by the model's name for it.

        Raises:
            FormatError: another shape, or no floats.
        """
        shape = self.model.get_parameter(mine).shape
        return _shaped(self.source.read(self.names[mine]), mine, shape, self.model)


def open_model_files(path: str | os.PathLike[str], revision: str | None = None) -> ModelFiles:
    """Open a model directory, a .gguf file or a Hub id.

    Nothing but names and config is read, and a head that the config ties to the embedding.
    """
    where = find_model(path, revision)
    if where.suffix == ".gguf":
        gguf = gguf_files.open_gguf(where)
        model = new_model(gguf.config)
        return ModelFiles(where, None, model, gguf, _match_names(model, gguf.names, where))
    if not (where / "config.json").is_file():
        raise FormatError(
            f"{where}: no config.json; expected a model directory; {instead_of_model(where)}"
        )
    found = read_json(where / "config.json")
    bits = bitsandbytes.stored_bits(found, str(where))
    model = new_model(read_config(found, str(where / "config.json")))
    plain = open_checkpoint(where, os.path.expanduser(path))
    source = plain if bits is None else bitsandbytes.QuantizedFiles(plain, bits)
    names = _match_names(model, source.names, where)
    if model.config.tie_word_embeddings and "lm_head.weight" in names:
        model = _tied_or_not(model, names, source)
    model.origin = Origin(where.resolve(), found)
    return ModelFiles(where, found, model, source, names)


def load_tokenizer(path: str | os.PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer that lies beside a model (`path` as in `load_model`)."""
    where = find_model(path, revision)
    if where.suffix == ".gguf":
        return gguf_files.gguf_tokenizer(where)
    return tokenizer_files.read_tokenizer(where)


def save_model(
    model: Model,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model directory that transformers opens; `path` must be missing or empty.

    With a `tokenizer`, its files are written too. What the directory that the model was loaded from
    says beside the weights is kept: each key of config.json that still holds,
    generation_config.json, the licence and the card. A quantized model is written in bitsandbytes'
    form, which transformers opens together with bitsandbytes, and lorax without it.

    Raises:
        UsageError: an adapter is still attached, the model is quantized in a way that bitsandbytes
            has no files for, or `path` is taken.
        EnvironmentProblem: the disk is full or refuses; nothing is left behind.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            raise UsageError(
                f"{name} carries an adapter: unload_adapter(model, merge=True) first, "
                "or save_adapter for the adapter alone"
            )
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | QuantizedLinear)}
    formats = bitsandbytes.stored_format(linears)
    plain = [name for name, module in linears.items() if isinstance(module, nn.Linear)]
    tensors = model.state_dict()
    if is_tied(model):
        del tensors["lm_head.weight"]
    for name in plain:
        if f"{name}.weight" in tensors:
            tensors[f"{name}.weight"] = model.as_stored(f"{name}.weight", tensors[f"{name}.weight"])
    config = write_config(model)
    if formats:
        dtype = model.get_parameter(model.embedding_name).dtype
        config["quantization_config"] = bitsandbytes.quantization_config(formats, plain, dtype)
    with written_directory(Path(path)) as directory:
        write_checkpoint(tensors, directory, max_shard_bytes)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer_files.write_tokenizer(tokenizer, directory)
        if model.origin is not None:
            copy_papers(model.origin.directory, directory)
            ends = None if tokenizer is None else tokenizer.end_token_ids
            copy_generation(model.origin.directory, directory, ends)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype behind a name; None for "auto"."""
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise UsageError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(DTYPES)}")
    return found


def as_device(device: str | torch.device) -> torch.device:
    """The torch device behind a name, if this machine has it.

    Raises:
        UsageError: no such kind of device. EnvironmentProblem: it is not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; expected cpu or cuda") from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if (found.index or 0) >= count:
        raise EnvironmentProblem(
            f"device {device} is not there: torch finds {count} CUDA devices; "
            "take one that is there, or cpu"
        )
    return found


def _match_names(model: Model, found: list[str], where: Path) -> dict[str, str]:
    """The model's tensor names -> the file's; every name on either side must have a partner."""
    expected = set(model.state_dict())
    prefix = f"{model.body_name}."
    names: dict[str, str] = {}
    for name in found:
        if _NO_WEIGHTS.search(name):
            continue
        mine = name if name in expected else prefix + name
        if mine not in expected:
            raise FormatError(
                f"{where}: tensor {name} has no place in the model of config.json; "
                "get the config.json that belongs to these weights"
            )
        if mine in names:
            raise FormatError(
                f"{where}: tensors {names[mine]} and {name} are one and the same; "
                "expected one of them; get the files anew, or save the model again"
            )
        names[mine] = name
    if model.config.tie_word_embeddings:  # one of the two is enough
        expected.discard("lm_head.weight")
        if model.embedding_name not in names and "lm_head.weight" in names:
            names[model.embedding_name] = names.pop("lm_head.weight")
    missing = sorted(expected - set(names))
    if missing:
        raise FormatError(
            f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}; get the "
            "files anew, or the config.json that belongs to these weights"
        )
    return names


def _tied_or_not(model: Model, names: dict[str, str], source: TensorSource) -> Model:
    """The model, its head tied unless the file holds another one than the embedding.

    transformers, too, takes both as they are where they differ. A head equal to the embedding
    leaves `names`.

    Raises:
        FormatError: the head is quantized, and so cannot be the embedding.
    """
    head = names["lm_head.weight"]
    if isinstance(source, bitsandbytes.QuantizedFiles) and source.parts(head):
        raise FormatError(
            f"{head} is quantized, although config.json ties it to the embedding; "
            "set tie_word_embeddings to false there, or get a checkpoint with a plain head"
        )
    if torch.equal(source.read(head), source.read(names[model.embedding_name])):
        del names["lm_head.weight"]
        return model
    return new_model(dataclasses.replace(model.config, tie_word_embeddings=False))


def _fill(
    files: ModelFiles, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> None:
    model = files.model
    plain = files.read if files.is_mapped else read_ahead(files.read, files.names)
    for mine in files.names:
        module_name, _, parameter = mine.rpartition(".")
        module = model.get_submodule(module_name)
        stored = _stored_weight(files, mine, module, dtype)
        if stored is not None:
            replace_module(model, module_name, _quantized_linear(stored.to(device), module, dtype))
            continue
        tensor = plain(mine).to(dtype=dtype, copy=files.is_mapped).to(device).contiguous()
        if quantization and parameter == "weight" and quantizable(module_name, module):
            weight = quantize(tensor, quantization, name=mine)
            replace_module(model, module_name, _quantized_linear(weight, module, dtype))
        else:
            setattr(module, parameter, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model.eval()


def _stored_weight(
    files: ModelFiles, mine: str, module: nn.Module, dtype: torch.dtype
) -> QuantizedTensor | None:
    """The weight as the file has quantized it, or None where it is plain."""
    if not isinstance(files.source, bitsandbytes.QuantizedFiles):
        return None
    return files.source.read_linear(files.names[mine], module, dtype)


def _quantized_linear(
    weight: QuantizedTensor, module: nn.Module, dtype: torch.dtype
) -> QuantizedLinear:
    """The Linear with this weight, and with the bias that `module` has or is going to get."""
    linear = QuantizedLinear(weight)
    linear.dtype = dtype
    assert isinstance(module, nn.Linear)
    linear.bias = module.bias
    return linear


def quantizable(name: str, module: nn.Module) -> bool:
    """Whether this module's weight is quantized: every Linear but the head, as elsewhere."""
    return isinstance(module, nn.Linear) and name != "lm_head"


def _shaped(tensor: Tensor, name: str, shape: torch.Size, model: Model) -> Tensor:
    tensor = model.as_stored(name, tensor)
    if tensor.shape != shape or tensor.dtype not in FLOATS:
        raise FormatError(
            f"{name}: found {tuple(tensor.shape)} {tensor.dtype}; expected {tuple(shape)}, "
            "floating; get the config.json that belongs to these weights"
        )
    return tensor
