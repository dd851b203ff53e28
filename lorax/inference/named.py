"""The public calls for several adapters on one model: load them by name, use one, ask for the set.

    model.forward      an instance's own, put on with the first name: it takes `adapters`, one a row

The model's class knows no adapters. The function that stands on the instance is one of lorax's, so
what computes in a module's place does so still (lorax/models/watched.py); a copy of the model has
one that is bound to the copy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import MethodType, TracebackType
from typing import Any

from torch import Tensor, nn

from lorax.adapters.config_keys import AdapterConfig
from lorax.errors import UsageError
from lorax.formats import peft
from lorax.inference.adapter_set import AdapterSet

_SET = "_adapter_set"


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    trainable: bool = False,
    *,
    check_base: bool = True,
    check_adapter: bool = True,
    resize_vocabulary: bool = False,
    name: str | None = None,
) -> AdapterConfig:
    """Load a PEFT adapter directory into the model, in place, or beside it under a name.

    Args:
        model: a model without an adapter; with a name, one whose adapters all have names.
        path: the directory, or one above it that holds no other adapter.
        trainable: whether the adapter requires gradients afterwards.
        name: what `use_adapter` and `model(input_ids, adapters=[...])` call it; it is not in use
            yet. PiSSA and OLoRA then become the plain LoRA of rank 2r that they amount to, unless
            they are trainable.
        check_base: refuse an adapter whose fingerprint is that of another base. Reads the base's
            files once more, the first time. False, where you know that the bases are the same.
        check_adapter: refuse an adapter that was changed since lorax saved it.
        resize_vocabulary: give embedding and head as many rows as the file's have; they stay so.

    Names in the config that the model lacks are passed over, as in PEFT, with a line in the log.

    Raises:
        AdapterError: a tensor is missing, unexpected, of another shape or not finite, the config
            does not fit the model, the vocabulary has another size, or the fingerprint does not
            hold; with a name, also an adapter without factors (a tuned prompt). The model is then
            as it was.
        FormatError: the directory is incomplete or damaged.
        UsageError: the name is taken, or goes with resize_vocabulary.
    """
    checks = {"check_base": check_base, "check_adapter": check_adapter}
    if name is None:
        return peft.load_adapter(
            model, path, trainable, **checks, resize_vocabulary=resize_vocabulary
        )
    if resize_vocabulary:
        raise UsageError(
            "resize_vocabulary changes the base of all adapters; expected a base of the right size "
            "for an adapter with a name; load it without a name"
        )
    return named_adapters(model).load(name, path, trainable, **checks)


def named_adapters(model: nn.Module) -> AdapterSet:
    """The model's adapters by name: list, remove, rename and mix them, and bound their memory.

    adapters = lorax.named_adapters(model)
    adapters.names, adapters.active, adapters.in_memory, adapters.nbytes
    adapters.rename("support", to="help"); adapters.remove("help")
    adapters.mix({"support": 0.7, "coding": 0.3}, name="both")
    adapters.budget = 20                 # in memory at once; the others come back from disk
    """
    if _SET not in vars(model):
        model.__dict__[_SET] = AdapterSet(model)
        model.forward = _forward_of(model)
    found = vars(model)[_SET]
    assert isinstance(found, AdapterSet)
    return found


def use_adapter(model: nn.Module, name: str | None) -> InUse:
    """Let the model compute with the adapter of that name from now on; None is the base alone.

    In a `with` statement the adapter that was in use before comes back at its end.

    Raises:
        UsageError: there is no such name.
        AdapterError: the model has an adapter without a name, or another base than it had.
    """
    adapters = named_adapters(model)
    before = adapters.active
    adapters.use(name)
    return InUse(adapters, before)


class InUse:
    """What `use_adapter` gives: the end of a `with` puts back the adapter of before."""

    def __init__(self, adapters: AdapterSet, before: str | None):
        self.adapters, self.before = adapters, before

    def __enter__(self) -> AdapterSet:
        return self.adapters

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        gone = self.before is not None and self.before not in self.adapters.names
        self.adapters.use(None if gone else self.before)


def forward(
    self: nn.Module, *inputs: Any, adapters: Sequence[str | None] | None = None, **named: Any
) -> Any:
    """The model's own forward; with `adapters` each row of the batch has the adapter named there.

    adapters: one a row, None for the base alone; not given, the adapter in use.
    """
    return _call(self, MethodType(type(self).forward, self), inputs, adapters, named)


def _forward_of(model: nn.Module) -> Any:
    """The forward above, or, around one that somebody put on the model, another with its name."""
    before = vars(model).get("forward")
    if before is None:
        return MethodType(forward, model)

    @functools.wraps(before)  # it stays somebody's from outside: lorax/models/watched.py
    def outside(*inputs: Any, adapters: Sequence[str | None] | None = None, **named: Any) -> Any:
        return _call(model, before, inputs, adapters, named)

    return outside


def _call(
    model: nn.Module,
    inner: Any,
    inputs: tuple[Any, ...],
    adapters: Sequence[str | None] | None,
    named: dict[str, Any],
) -> Any:
    if adapters is None:
        return inner(*inputs, **named)
    first = next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
    if first is None:
        raise UsageError("adapters: there is no batch; expected a tensor, a row for each name")
    with named_adapters(model).rows(adapters, len(first)):
        return inner(*inputs, **named)
