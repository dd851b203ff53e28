"""Which base an adapter was trained over, and whether it is what its author saved.

An adapter's safetensors file carries one more entry of metadata, which PEFT reads past:

    lorax.fingerprint = {
      "format": 2,  "lorax": "0.1.0",
      "base":    {"sha256": ..., "path": ..., "config": {...}} or {"sha256": null, ...},
      "quantization": null | "nf4-dq" | ...,
      "adapter": {"sha256": ..., "settings": {"peft_type": "LORA", "r": 16, ...},
                  "tensors": ["0123abcd", ...]}
    }

`settings` is the whole adapter_config.json but for what only describes it (task_type, revision,
names of other files, ...), and of that what is not the default: so a key that a later version adds
counts as its default in every older file. Format 1 had five settings and is checked as it was.

The base's digest is over its tensors as they are stored in its files, so that one base loaded as
float32, bfloat16 or NF4 is one base, however its files are cut into shards:

    for each tensor, by its name in the model:   "NAME DTYPE SHAPE SHA256-OF-ITS-BYTES\\n"
    digest = SHA-256 of these lines, sorted

`tensors` has 8 hexadecimal digits a tensor, in the order of the names, so that a mismatch can name
the tensors; files without it are read too.

A bitsandbytes checkpoint is one with its scales, a .gguf file one with its packed blocks: each is a
base of its own, since its numbers differ from those that it was made from. Names are the model's,
so GPT-2 with and without the prefix "transformer." is one; a tied head is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorax.adapters.attached import adapter_layers
from lorax.adapters.config_files import DESCRIPTIVE, default_of
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.tables import is_language_model
from lorax.errors import AdapterError, EnvironmentProblem, FormatError, LoraxError
from lorax.formats.bitsandbytes import QuantizedFiles
from lorax.formats.gguf_files import GGUFFile
from lorax.formats.hub import find_model
from lorax.formats.huggingface import ModelFiles, open_model_files
from lorax.formats.json_files import parse_json
from lorax.quant.linear import QuantizedLinear
from lorax.version import __version__

log = logging.getLogger("lorax")

MOST_NAMED = 5  # options that a message names
KEY = "lorax.fingerprint"
FORMAT = 2
# Of an adapter's config, what says nothing about what it computes or trains.
DESCRIBES = DESCRIPTIVE - {"peft_type"} | {"tokenizer_name_or_path"}
# Format 1's settings.
SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

_digests: dict[tuple[tuple[str, int, int], ...], str] = {}


def describe(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> str:
    """The metadata's value for this adapter over this model, as JSON.

    A model that was not loaded from files, or whose files are gone, has no digest: one line in the
    log says so, and only the adapter's own is kept.
    """
    base: dict[str, Any] = {"sha256": None, "path": getattr(model, "name_or_path", "") or None}
    base["config"] = _config(model)
    try:
        base["sha256"] = model_digest(model)
    except LoraxError as error:
        if is_language_model(model):  # another module is never loaded from files
            log.warning("the adapter carries no fingerprint of its base: %s", error)
    settings = _settings(config)
    lines = _lines_by_name(tensors)
    adapter = {"sha256": _adapter_digest(lines, settings), "settings": settings}
    return json.dumps(
        {
            "format": FORMAT,
            "lorax": __version__,
            "base": base,
            "quantization": quantization(model),
            "adapter": adapter | {"tensors": _short_digests(lines)},
        }
    )


def parse(text: str, where: str) -> dict[str, Any]:
    """Read the metadata's value; {} if a later lorax wrote it in a form unknown here.

    Raises:
        FormatError: it is damaged.
    """
    found = parse_json(text, f"{where}: {KEY}")
    if isinstance(found.get("format"), int) and found["format"] > FORMAT:
        log.warning("%s: a later lorax's fingerprint, which is not checked", where)
        return {}
    parts = [("base",), ("base", "config"), ("adapter",), ("adapter", "settings")]
    for path in parts:
        part: Any = found
        for key in path:
            part = part.get(key)
        if not isinstance(part, dict):
            raise FormatError(
                f"{where}: {KEY}: {'.'.join(path)} is {part!r}; expected an object; "
                "get the file anew"
            )
    return found


def check_adapter(
    found: Mapping[str, Any], config: Any, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Hold the adapter against its own digest.

    Raises:
        AdapterError: a tensor or a setting is not what was saved; settings are named.
    """
    if not found:
        return
    stated = found["adapter"]
    then = stated["settings"]
    if found.get("format") != FORMAT:
        settings, defaults = _settings_of_format_1(config), {}
        keys = list(settings)
    else:
        settings, defaults = _settings(config), _defaults_of(config)
        keys = sorted({*settings, *then})
    edited = [
        f"{key} is {settings.get(key, defaults.get(key))!r}, "
        f"was {then.get(key, defaults.get(key))!r}"
        for key in keys
        if _as_json(settings.get(key, defaults.get(key)))
        != _as_json(then.get(key, defaults.get(key)))
    ]
    hint = (
        "Get the files anew; or, if the change is meant, use "
        "lorax.load_adapter(..., check_adapter=False) and save_adapter again"
    )
    if edited:
        raise AdapterError(f"{where}: changed since it was saved: {'; '.join(edited)}. {hint}")
    lines = _lines_by_name(tensors)
    if _adapter_digest(lines, settings) != stated.get("sha256"):
        raise AdapterError(
            f"{where}: its tensors are not those that were saved (another SHA-256"
            f"{_changed(lines, stated.get('tensors'))}). {hint}"
        )


def check_base(found: Mapping[str, Any], model: nn.Module, where: str) -> None:
    """Hold the model against the base that the adapter was trained over.

    Another quantization of the same base, or a base that cannot be checked, is a line in the log.

    Raises:
        AdapterError: another base; the message says what differs.
    """
    if not found:
        return
    stated = found["base"]
    now, then = quantization(model), found.get("quantization")
    name = getattr(model, "name_or_path", "") or "a model without files"
    ways = _different(_defaults(model) | stated["config"], _config(model))
    hint = "Load it over its base, or with check_base=False (--no-check-base) if you know better"
    if ways:
        raise AdapterError(
            f"{where}: trained over {stated.get('path')}, this is {name}, and their configs "
            f"differ: {'; '.join(ways)}. {hint}"
        )
    try:
        digest = model_digest(model) if stated.get("sha256") else None
    except LoraxError as error:
        log.warning("%s: whether this is its base cannot be checked: %s", where, error)
        digest = None
    if digest is not None and digest != stated["sha256"]:
        raise AdapterError(
            f"{where}: trained over {stated.get('path')}, whose tensors have the SHA-256 "
            f"{str(stated['sha256'])[:16]}...; this is {name} with {digest[:16]}..., of the same "
            f"shapes but other values or dtypes. {hint}"
        )
    if now != then:
        log.warning(
            "%s: trained over a base %s, loaded over one %s; to have what was trained: %s",
            where,
            f"quantized as {then}" if then else "that was not quantized",
            f"quantized as {now}" if now else "that is not quantized",
            f"quantization={then!r} (--quantization {then})" if then else "no quantization",
        )


def quantization(model: nn.Module) -> str | None:
    """The formats of the model's quantized Linears, "nf4" or "nf4+nf4-dq"; None if there are none.

    What double quantization left with float32 scales is counted with the rest. LoftQ's own copies
    are not the base's: that one is plain, and has to be when the adapter is loaded.
    """
    own = {copy for layer in adapter_layers(model).values() for copy in layer.copies()}
    linears = {m for m in model.modules() if isinstance(m, QuantizedLinear)} - own
    found = {linear.quantized.format for linear in linears}
    found -= {name.removesuffix("-dq") for name in found if name.endswith("-dq")}
    return "+".join(sorted(found)) or None


def adapter_digest(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 over the settings and over every tensor's name, dtype, shape and bytes; in hex."""
    return _adapter_digest(_lines_by_name(tensors), settings)


def _lines_by_name(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: _line(name, *_plain(tensors[name])) for name in sorted(tensors)}


def _adapter_digest(lines: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    return _sha256([json.dumps(dict(settings)), *sorted(lines.values())])


def _short_digests(lines: Mapping[str, str]) -> list[str]:
    return [_sha256([line])[:8] for line in lines.values()]


def _changed(lines: Mapping[str, str], then: Any) -> str:
    """Which tensors differ, where the fingerprint has a digest for each."""
    if not isinstance(then, list) or len(then) != len(lines):
        return "" if then is None else f"; {len(lines)} tensors, there were {len(then)}"
    now = _short_digests(lines)
    changed = [name for name, a, b in zip(lines, now, then, strict=True) if a != b]
    if not changed:
        return ""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"; changed: {', '.join(changed[:3])}{more}"


def model_digest(model: nn.Module) -> str:
    """The digest of the files that the model was loaded from, in hex; see `files_digest`.

    Raises:
        AdapterError: it was not loaded from files. FormatError, EnvironmentProblem: they are gone
            or damaged since.
    """
    where = getattr(model, "loaded_from", None)
    if where is None:
        raise AdapterError(
            "the model's weights are not those of any file; load it with lorax.load_model"
        )
    return files_digest(where)


def files_digest(path: str | Path) -> str:
    """SHA-256 over a model's tensors as stored, in hex, independent of shards.

    Reads every byte once, one tensor at a time; kept for the process, by the files' names, sizes
    and times.
    """
    where = find_model(path)
    homes = [where] if where.is_file() else where.glob("*.safetensors*")
    try:
        states = ((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in homes)
        key = tuple(sorted(states))
    except OSError as error:
        raise EnvironmentProblem(
            f"{where}: cannot be read ({error}); load the model from where its files are now"
        ) from None
    if key not in _digests:
        _digests[key] = _sha256(sorted(_lines(open_model_files(where))))
    return _digests[key]


def _lines(files: ModelFiles) -> Iterator[str]:
    source = files.source
    for mine, theirs in files.names.items():
        if isinstance(source, GGUFFile):
            yield _line(mine, *source.stored(theirs))
            continue
        yield _line(mine, *_plain(source.read(theirs)))
        if isinstance(source, QuantizedFiles):
            for part, full in source.parts(theirs).items():
                yield _line(mine.removesuffix("weight") + part, *_plain(source.read(full)))


def _line(name: str, dtype: str, shape: tuple[int, ...], data: Any) -> str:
    return f"{name} {dtype} {list(shape)} {hashlib.sha256(data).hexdigest()}"


def _plain(tensor: Tensor) -> tuple[str, tuple[int, ...], np.ndarray[Any, Any]]:
    flat = tensor.detach().cpu().contiguous().flatten()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy()


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def _settings(config: AdapterConfig) -> dict[str, Any]:
    """What of the config is not the default, as JSON has it, in the order of the names."""
    fields: Any = config
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(fields)}
    values["peft_type"] = getattr(config, "peft_type", None)
    defaults = _defaults_of(config)
    return {
        key: json.loads(_as_json(values[key]))
        for key in sorted(values)
        if key not in DESCRIBES and _as_json(values[key]) != _as_json(defaults.get(key))
    }


def _defaults_of(config: AdapterConfig) -> dict[str, Any]:
    """The config's defaults; its peft_type has none, so that it is always among the settings."""
    fields: Any = config
    return {f.name: default_of(f) for f in dataclasses.fields(fields) if f.name != "peft_type"}


def _as_json(value: Any) -> str:
    """One text for what a file does not tell apart: 8 is 8.0, a tuple is a list."""
    return json.dumps(_whole(value), sort_keys=False)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _whole(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(inside) for inside in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _settings_of_format_1(config: Any) -> dict[str, Any]:
    """The settings that format 1 kept, of any kind of adapter; alphas as floats."""
    values: dict[str, Any] = {key: getattr(config, key, None) for key in SETTINGS}
    if values["lora_alpha"] is not None:
        values["lora_alpha"] = float(values["lora_alpha"])
    if values["alpha_pattern"] is not None:
        values["alpha_pattern"] = {k: float(v) for k, v in values["alpha_pattern"].items()}
    if hasattr(config, "init_r"):
        values["init_r"] = config.init_r
    return values


def _config(model: nn.Module) -> dict[str, Any]:
    """What the base computes with beside its weights; a module without a config has its kind."""
    if not is_language_model(model):
        return {"kind": type(model).__name__}
    config: Any = model.config
    values: dict[str, Any] = dataclasses.asdict(config)
    values.pop("max_position_embeddings", None)  # where the context ends changes no number
    return {"kind": type(model).__name__, **json.loads(json.dumps(values))}


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What options mean that an adapter does not state: it is older than they are."""
    if not is_language_model(model):
        return {}
    config: Any = model.config
    stated = _config(model)
    options = [o for o in dataclasses.fields(config) if o.name in stated]
    return {o.name: o.default for o in options if o.default is not dataclasses.MISSING}


def _different(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    keys = ["kind"] if "kind" in keys else keys  # of another kind's options each one differs
    found = [f"{key} {now.get(key)!r} here, {then.get(key)!r} there" for key in keys[:MOST_NAMED]]
    return found + ([f"and {len(keys) - MOST_NAMED} more"] if len(keys) > MOST_NAMED else [])
