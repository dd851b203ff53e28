"""Several adapters on one model, by name: one in use, or a row of a batch each.

    lorax.load_adapter(model, "runs/a/adapter", name="support")
    lorax.use_adapter(model, "support")                     the model is as with that adapter alone
    logits = model(input_ids, adapters=["support", None])   a row each, None is the base alone

The names stand beside the model: outside of a call its modules are the base's own, or those that
`load_adapter` without a name puts in (lorax/adapters/switch.py). So files, merging, generation and
comparing know nothing of names.

Hundreds of adapters need not be in memory. With a budget those that were used last are; the others
are let go and read again from their directories when they are asked for. PiSSA and OLoRA are kept
as the plain LoRA of rank 2r that they amount to, in a directory of the set's own, so that coming
back decomposes nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from lorax.adapters.arithmetic import Adapter
from lorax.adapters.attached import adapter_layers, variant_of
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.switch import AdapterModules
from lorax.errors import AdapterError, UsageError
from lorax.formats import peft
from lorax.formats.adapter_data import write_adapter
from lorax.formats.peft_directory import CONFIG, TENSORS, find_adapter, read_adapter_config
from lorax.inference.mixed import MixedLayer, RowGroups


@dataclass
class Named:
    """One adapter of a set.

    directory: where it is read from again. stamps: what its files were then, by size and time.
    modules: None while it is on disk alone. used: when it was used last, counted in uses.
    folder: the directory, where it is the set's own.
    """

    directory: Path
    stamps: list[tuple[int, int]]
    modules: AdapterModules | None
    used: int
    folder: OwnFolder | None = None

    @property
    def may_go(self) -> bool:
        """Whether it is in memory, and its files hold all that it is."""
        modules = self.modules
        return modules is not None and not modules.is_trained and not modules.is_merged


class OwnFolder:
    """A temporary directory, which goes when nobody holds this any more; copies share it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="lorax-adapter-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __deepcopy__(self, memo: Any) -> OwnFolder:
        return self


class AdapterSet:
    """The adapters of one model by their names; `named_adapters(model)` gives it.

    A set is used by one thread at a time, as its model is.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._named: dict[str, Named] = {}
        self._active: Named | None = None
        self._rows = RowGroups()
        self._mixed: dict[str, MixedLayer] = {}
        self._uses = 0
        self._budget: int | None = None

    # What there is -----------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """All names, in the order in which they came."""
        return list(self._named)

    @property
    def active(self) -> str | None:
        """The name of the adapter in use; None for the base alone."""
        inside = self._in_model()
        return next((name for name, one in self._named.items() if one is inside), None)

    @property
    def in_memory(self) -> list[str]:
        """The names of those that are not on disk alone."""
        return [name for name, one in self._named.items() if one.modules is not None]

    @property
    def nbytes(self) -> int:
        """What the adapters in memory take there."""
        return sum(one.modules.nbytes for one in self._named.values() if one.modules is not None)

    @property
    def budget(self) -> int | None:
        """How many adapters may be in memory at a time; None, the default, for all.

        What is trained or merged stays there, and counts; so does the one in use until another one
        is. What was changed by hand is lost with the memory: save it first.
        """
        return self._budget

    @budget.setter
    def budget(self, count: int | None) -> None:
        if count is not None and count < 1:
            raise UsageError(f"budget {count}; expected 1 adapter or more, or None for no bound")
        self._budget = count
        self._make_room()

    # Coming and going --------------------------------------------------------------------------

    def load(
        self, name: str, path: str | os.PathLike[str], trainable: bool = False, **checks: bool
    ) -> AdapterConfig:
        """Read a PEFT directory under a name that is free; see `load_adapter`."""
        self._check_free(name)
        directory = find_adapter(path)
        _check_kind(directory)
        self._make_room(coming=1)
        folder = None
        with self._base_alone():
            modules = self._read(directory, trainable, **checks)
            if not trainable and any(layer.moves_base for layer in modules.layers.values()):
                folder = self._as_plain(modules)
                directory = folder.path / "adapter"
                modules = self._read(directory)
        self._add(name, directory, modules, folder)
        assert modules.config is not None
        return modules.config

    def _add(
        self, name: str, directory: Path, modules: AdapterModules, folder: OwnFolder | None
    ) -> None:
        stamps = _stamps(directory)
        self._named[name] = Named(directory, stamps, modules, self._next_use(), folder)

    def remove(self, name: str) -> None:
        """Forget an adapter; its directory stays. The base is in use if it was that one."""
        one = self._find(name)
        if one is self._in_model():
            self.use(None)
        del self._named[name]

    def rename(self, name: str, to: str) -> None:
        """Give an adapter another name that is free; it stays in its place, and in use."""
        self._find(name)
        self._check_free(to)
        self._named = {to if n == name else n: one for n, one in self._named.items()}

    def mix(self, weights: Mapping[str, float], name: str) -> None:
        """A new adapter: the sum of these, each times its weight, exact.

        The factors are put behind each other (PEFT's combination_type="cat"), and the ranks add up.
        So it is for those that are a low-rank matrix beside each weight: LoRA, rsLoRA, AdaLoRA,
        PiSSA and OLoRA on Linears, with any pattern of ranks and alphas. What else an adapter may
        have (DoRA, lora_bias, layers on an embedding, trained tokens, biases and modules) has no
        exact sum.

        Raises:
            UsageError: an unknown name, none at all, or a name that is taken.
            AdapterError: one is more than low-rank matrices; the message says which, and why.
        """
        self._check_free(name)
        if not weights:
            raise UsageError("no adapter to mix; expected {name: weight}, one at least")
        parts = [weight * self._as_data(other) for other, weight in weights.items()]
        total = sum(parts[1:], parts[0])
        layers = {path: layer for path, layer in total.layers.items() if layer.rank}
        folder = OwnFolder()
        write_adapter(replace(total, layers=layers), folder.path / "adapter")
        self.load(name, folder.path)
        self._named[name].folder = folder

    def use(self, name: str | None) -> None:
        """Let the model compute with that adapter, or as its base."""
        self._switch(None if name is None else self._find(name))

    @contextmanager
    def rows(self, names: Sequence[str | None], batch: int) -> Iterator[None]:
        """Inside, row i of a batch has the adapter names[i]; afterwards all is as it was.

        Raises:
            UsageError: not a name a row, one that is unknown, or more at once than the budget has.
            AdapterError: one cannot be a row's own; the message says why.
        """
        self.check_rows(names, batch)
        with self.standing(list(dict.fromkeys(names))) as groups:
            groups.set(names)
            yield

    @contextmanager
    def standing(self, names: Sequence[str | None]) -> Iterator[RowGroups]:
        """Inside, the model has what computes with these, each once; afterwards all is as it was.

        Of several, it has a `MixedLayer` at each adapted path: `set` of what is given says which
        row has which.

        Raises:
            UsageError: more at once than the budget has. AdapterError: as `rows`.
        """
        named = [name for name in names if name is not None]
        if self._budget is not None and len(named) > self._budget:
            raise UsageError(
                f"adapters: {len(named)} at once, and the budget is {self._budget}; expected no "
                "more than that; give fewer in one batch, or a larger budget"
            )
        if len(names) == 1:
            before = self._in_model()
            self.use(names[0])
            try:
                yield self._rows
            finally:
                self._switch(before)
            return
        with self._base_alone():
            mixed = self._mixed_modules(named)
            mixed.put_in(self._model)
            try:
                yield self._rows
            finally:
                mixed.take_out(self._model)
                self._let_go()

    def check_rows(self, names: Sequence[str | None], batch: int) -> None:
        """Refuse, as a UsageError, what is not a known name or None for each row of a batch."""
        if isinstance(names, str) or len(names) != batch:
            found = repr(names) if isinstance(names, str) else f"{len(names)} names"
            raise UsageError(f"adapters: {found} for {batch} rows; expected a name or None a row")
        for name in dict.fromkeys(names):
            if name is not None:
                self._find(name)

    # How ---------------------------------------------------------------------------------------

    def _find(self, name: str) -> Named:
        if name not in self._named:
            near = get_close_matches(str(name), self._named, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {self.names or 'none'}"
            raise UsageError(f"no adapter is named {name!r}; {hint}")
        return self._named[name]

    def _check_free(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise UsageError(f"the adapter's name is {name!r}; expected a text")
        if name in self._named:
            raise UsageError(
                f"an adapter is named {name!r} already; take another name, or remove that one: "
                f"lorax.named_adapters(model).remove({name!r})"
            )

    def _next_use(self) -> int:
        self._uses += 1
        return self._uses

    def _switch(self, wanted: Named | None) -> None:
        """Put `wanted` in the active one's place; where that fails, the active one stays."""
        if wanted is not None:
            wanted.used = self._next_use()
        if wanted is self._in_model():
            self._refuse_unnamed()
            return
        modules = None if wanted is None else self._fetched(wanted)
        before = self._take_out()
        try:
            if modules is not None:
                modules.check_base(self._model)
            before = wanted
        finally:
            self._put_in(before)
            self._make_room()

    def _in_model(self) -> Named | None:
        """The one in use, if it is in the model still: `unload_adapter` may have taken it out."""
        one = self._active
        if one is None or one.modules is None or not one.modules.are_in(self._model):
            return None
        return one

    def _take_out(self) -> Named | None:
        """The model as its base; gives what stood in it."""
        stood = self._in_model()
        if stood is not None and stood.modules is not None:
            stood.modules.take_out(self._model)
        self._active = None
        self._refuse_unnamed()
        return stood

    def _put_in(self, one: Named | None) -> None:
        """What `_take_out` gave; it may have gone to disk in between."""
        if one is not None:
            self._fetched(one).put_in(self._model)
        self._active = one

    def _refuse_unnamed(self) -> None:
        if self._in_model() is None and "adapter_config" in vars(self._model):
            raise AdapterError(
                "the model has an adapter without a name; expected the base alone, or one with a "
                "name: unload_adapter(model) first"
            )

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """Inside, no adapter is in the model; afterwards the active one is again."""
        before = self._take_out()
        try:
            yield
        finally:
            self._put_in(before)

    def _read(self, directory: Path, trainable: bool = False, **checks: bool) -> AdapterModules:
        """The modules of that directory, which the model does not keep."""
        try:
            peft.load_adapter(self._model, directory, trainable, **checks)
            return AdapterModules.of(self._model)
        finally:
            if adapter_layers(self._model):
                AdapterModules.of(self._model).take_out(self._model)

    def _as_plain(self, modules: AdapterModules) -> OwnFolder:
        """A folder with these as a plain LoRA of rank 2r."""
        folder = OwnFolder()
        modules.put_in(self._model)
        try:
            peft.save_adapter(self._model, folder.path / "adapter", plain=True)
        finally:
            modules.take_out(self._model)
        return folder

    def _as_data(self, name: str) -> Adapter:
        before = self._in_model()
        self.use(name)
        try:
            return Adapter.of(self._model)
        except AdapterError as error:
            raise AdapterError(f"{name!r}: {error}") from None
        finally:
            self._switch(before)

    def _fetched(self, one: Named, keep: Collection[Named] = ()) -> AdapterModules:
        """Its modules, read again where they are on disk alone."""
        if one.modules is None:
            if _stamps(one.directory) != one.stamps:
                raise AdapterError(
                    f"{one.directory}: its files were changed since they were loaded; expected "
                    "them as they were; remove the adapter from the set, and load it anew"
                )
            self._make_room(keep, coming=1)
            with self._base_alone():
                one.modules = self._read(one.directory, check_base=False, check_adapter=False)
        return one.modules

    def _make_room(self, keep: Collection[Named] = (), coming: int = 0) -> None:
        """Let go of those that were used longest ago, until `coming` more are within the budget."""
        if self._budget is None:
            return
        staying = {id(one) for one in (*keep, self._active) if one is not None}
        may_go = [o for o in self._named.values() if o.may_go and id(o) not in staying]
        may_go.sort(key=lambda one: one.used)
        for one in may_go[: max(0, len(self.in_memory) + coming - self._budget)]:
            one.modules = None

    def _mixed_modules(self, names: Sequence[str]) -> AdapterModules:
        """What stands in the model while its rows have these adapters."""
        wanted = {name: self._named[name] for name in names}
        layers: dict[str, MixedLayer] = {}
        self._let_go()  # what a call that was refused has left
        for name, one in wanted.items():
            one.used = self._next_use()
            modules = self._fetched(one, wanted.values())
            modules.check_base(self._model)
            if modules.replaced:
                raise AdapterError(
                    f"{name!r} replaces {modules.replaced[0].places[0]}, which all rows of a batch "
                    "share; expected layers beside the base's; give its rows a batch of their own"
                )
            modules.settle()
            for path, layer in modules.layers.items():
                if path not in layers:
                    layers[path] = self._mixed_layer(path, layer.base_layer)
                layers[path].layers[name] = layer
        return AdapterModules(dict(layers))

    def _mixed_layer(self, path: str, base: nn.Module) -> MixedLayer:
        found = self._mixed.get(path)
        if found is None or found.base_layer is not base:
            found = self._mixed[path] = MixedLayer(base, self._rows)
        return found

    def _let_go(self) -> None:
        """The mixed layers hold nothing that may leave memory."""
        for layer in self._mixed.values():
            layer.layers.clear()


def _check_kind(directory: Path) -> None:
    """Refuse, before anything is computed, an adapter that has no layers beside the base's."""
    config, _ = read_adapter_config(directory)
    variant = variant_of(config)
    if not variant.is_around_modules:
        raise AdapterError(
            f"{directory / CONFIG}: {variant.title} has no factors beside the model's weights, so "
            "it cannot be one adapter of several; load it without a name"
        )


def _stamps(directory: Path) -> list[tuple[int, int]]:
    """Size and time of the adapter's files, by which a change is seen."""
    found = []
    for name in (CONFIG, TENSORS):
        try:
            status = (directory / name).stat()
        except OSError:
            found.append((-1, -1))
        else:
            found.append((status.st_size, status.st_mtime_ns))
    return found
