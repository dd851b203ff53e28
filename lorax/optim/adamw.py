"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2).

    p   <- p (1 - lr weight_decay)                      decoupled: decay does not enter the moments
    m   <- m + (1 - beta1) (g - m)                      exp_avg
    v   <- beta2 v + (1 - beta2) g^2                    exp_avg_sq
    p   <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

These are the operations of `torch.optim.AdamW(foreach=False)` in its order, so in float32 the
parameters and both moments agree with it bit for bit, step after step; torch's fused AdamW rounds
differently. `adamw_` is the step, on flat tensors; flat.py lays parameters and moments out flat.
The fast twin on CUDA is one Triton kernel (fused.py says where its rounding agrees).

State is 8 bytes a parameter: two float32 moments. 16-bit parameters have float32 moments as well;
their step is computed in float32 and rounded once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lorax.errors import UsageError
from lorax.kernels.hyper import AdamWStep
from lorax.optim.flat import (
    ALIGNMENT,
    Hyperparameters,
    Moments,
    Page,
    Scratch,
    carve,
    check_parameter,
    fill_pages,
    page_elements,
    round_up,
    state_dtype,
)
from lorax.optim.fused import Launches, takes_kernel
from lorax.optim.memory import Memory, OrdinaryMemory

State = dict[str, Any]


def adamw_(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyperparameters
) -> None:
    """One AdamW step in place.

    Args:
        p: (n,) parameters, float32 or float64, updated.
        g: (n,) gradients, same dtype, read only.
        exp_avg, exp_avg_sq: (n,) first and second moments, same dtype, updated.
        hyper: learning rate, betas, eps, weight decay, and the 1-based step.
    """
    if hyper.maximize:
        g = -g
    if hyper.weight_decay != 0:
        p.mul_(1 - hyper.lr * hyper.weight_decay)
    exp_avg.lerp_(g, 1 - hyper.beta1)  # torch's rounding: m + (1 - beta1) (g - m)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
    # Bias corrections enter as scalars in float64, not as tensors.
    step_size = hyper.lr / (1 - hyper.beta1**hyper.step)
    correction = (1 - hyper.beta2**hyper.step) ** 0.5
    p.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(correction).add_(hyper.eps), value=-step_size)


class FloatMoments(Moments):
    """Moments in floating point: exp_avg of all the page's elements, then exp_avg_sq."""

    align = 1

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.kind = (FloatMoments, dtype)

    def nbytes(self, elements: int) -> int:
        """Bytes for both moments, each aligned."""
        return 2 * round_up(elements * self.dtype.itemsize, ALIGNMENT)

    def bind(self, memory: Tensor, elements: int) -> None:
        """Lay both over `memory` (bytes,) uint8."""
        self.exp_avg, behind = carve(memory, 0, self.dtype, elements)
        self.exp_avg_sq, _ = carve(memory, behind, self.dtype, elements)

    def state(self, start: int, shape: torch.Size) -> dict[str, Tensor]:
        """Views of a parameter's moments, in its shape, as torch's AdamW names them."""
        stop = start + shape.numel()
        return {
            "exp_avg": self.exp_avg[start:stop].view(shape),
            "exp_avg_sq": self.exp_avg_sq[start:stop].view(shape),
        }

    def read(self, start: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Copies of a parameter's moments, in its shape."""
        state = self.state(start, shape)
        return state["exp_avg"].clone(), state["exp_avg_sq"].clone()

    def step_(self, p: Tensor, g: Tensor, start: int, hyper: Hyperparameters) -> None:
        """Step p (n,) along g (n,), whose moments begin at `start`."""
        stop = start + p.numel()
        adamw_(p, g, self.exp_avg[start:stop], self.exp_avg_sq[start:stop], hyper)

    def launch(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        steps: Sequence[AdamWStep],
        factor: Tensor | None = None,
    ) -> None:
        """Step all of them in one launch of the Triton kernel."""
        kernels = import_module("lorax.kernels.adamw")  # needs triton
        columns = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        kernels.adamw(params, grads, *columns, steps, factor)


class AdamW(torch.optim.Optimizer):
    """AdamW with torch's signature and state_dict: step, exp_avg, exp_avg_sq.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as for `torch.optim.AdamW`.
        fused: False runs PyTorch's operations on CUDA instead of the Triton kernel (fused.py).
        foreach: accepted for compatibility with torch; has no effect.
        amsgrad, capturable, differentiable: not supported; must be False.
        memory: allocator of the states (memory.py); default: ordinary memory.

    Raises:
        UsageError: a value out of range, or an unsupported option set to True.
    """

    factor: Tensor | None  # of the next step's gradients (clip.py)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        memory: Memory | None = None,
    ):
        self._drop_state()
        self.memory = memory or OrdinaryMemory()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, {**defaults, **self._more_defaults()})

    def _more_defaults(self) -> dict[str, Any]:
        """Defaults that a subclass adds to its parameter groups."""
        return {}

    def _moments(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Moments:
        """New, unbound moments for this parameter: float here, 8-bit in AdamW8bit."""
        return FloatMoments(state_dtype(parameter))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do.

        Raises:
            UsageError: one of its values is out of range.
        """
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; return the value of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        new = [
            p
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and p not in self._home
        ]
        if new:
            self._install(self._build(new))
        launches = Launches(self.factor)
        for page in self.memory.walk(self._pages):
            group = self.param_groups[page.group]
            if not takes_kernel(page, group):
                page.step(group, self.factor)
                continue
            launches.add(page, group)
            if self.memory.one_by_one:
                launches.start()
        launches.start()
        self.factor = None
        return loss

    def state_bytes(self) -> int:
        """Bytes of optimizer state held now; 0 before the first step."""
        return sum(page.nbytes + page.steps.nbytes for page in self._pages)

    def moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Copies of a parameter's exp_avg and exp_avg_sq, decoded to floats, in its shape.

        Raises:
            UsageError: the parameter has no state yet; it has not been stepped.
        """
        if parameter not in self._home:
            raise UsageError(
                f"a parameter of shape {tuple(parameter.shape)} has no moments; they begin with "
                "the first step that finds a gradient on it; take that first"
            )
        page, index = self._home[parameter]
        return page.read(index)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict; its tensors are copied.

        Raises:
            UsageError: groups, names, shapes or dtypes do not match; the optimizer is unchanged.
        """
        groups = self._match_groups(state_dict["param_groups"])
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in groups for p in group["params"]]
        by_id = dict(zip(ids, parameters, strict=True))
        unknown = [i for i in state_dict["state"] if i not in by_id]
        if unknown:
            raise UsageError(
                f"the state has an entry {unknown[0]!r} that is in no group; expected those of its "
                "param_groups; take it from one state_dict()"
            )
        states = {by_id[i]: state for i, state in state_dict["state"].items()}
        before, self.param_groups = self.param_groups, groups
        try:
            pages = self._filled_pages(states)
        except UsageError:
            self.param_groups = before
            raise
        self._drop_state()
        self.state.clear()
        self._install(pages)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "memory": self.memory.fresh()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copy.deepcopy and pickle: copy groups and states into newly allocated memory."""
        super().__setstate__(state)
        self._drop_state()
        pages = self._filled_pages(dict(self.state))
        self.state.clear()
        self._install(pages)

    def _drop_state(self) -> None:
        self._pages: list[Page] = []
        self._home: dict[Tensor, tuple[Page, int]] = {}
        self._scratch = Scratch()
        self.factor = None

    def _match_groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The saved groups' values with this optimizer's parameters."""
        have = [len(group["params"]) for group in self.param_groups]
        found = [len(group["params"]) for group in saved]
        if have != found:
            raise UsageError(
                f"the state has groups of {found} parameters; this optimizer has {have}: "
                "build it with the same groups"
            )
        groups = []
        for mine, theirs in zip(self.param_groups, saved, strict=True):
            values = {key: copy.copy(v) for key, v in theirs.items() if key != "params"}
            groups.append({**self.defaults, **mine, **values, "params": mine["params"]})
            check_group(groups[-1])
        return groups

    def _filled_pages(self, states: Mapping[Tensor, State]) -> list[Page]:
        """New pages for the parameters of `states`, with the states copied in."""
        order = [p for group in self.param_groups for p in group["params"] if p in states]
        pages = self._build(order)
        for page in pages:
            for index, parameter in enumerate(page.parameters):
                _copy_state(page.state(index), states[parameter])
        return pages

    def _build(self, parameters: Iterable[nn.Parameter]) -> list[Page]:
        """New pages for these parameters; one flat allocation per device."""
        bundles: dict[Any, list[nn.Parameter]] = {}
        kinds: dict[Any, Moments] = {}
        place = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        for p in parameters:
            check_parameter(p)
            moments = self._moments(p, self.param_groups[place[p]])
            key = (place[p], p.dtype, p.device, type(moments))
            kinds[key] = moments
            bundles.setdefault(key, []).append(p)
        pages = []
        for key, bundle in bundles.items():
            group, _, device, _ = key
            for some in fill_pages(bundle, page_elements(device), kinds[key].align):
                pages.append(Page(some, group, copy.copy(kinds[key]), self._scratch))
        self._allocate(pages)
        return pages

    def _allocate(self, pages: list[Page]) -> None:
        for device in dict.fromkeys(page.parameters[0].device for page in pages):
            here = [page for page in pages if page.parameters[0].device == device]
            memory = self.memory.allocate(sum(page.nbytes for page in here), device)
            for page, piece in zip(here, memory.split([p.nbytes for p in here]), strict=True):
                page.bind(piece)

    def _install(self, pages: list[Page]) -> None:
        for page in pages:
            self._pages.append(page)
            for index, parameter in enumerate(page.parameters):
                self._home[parameter] = (page, index)
                self.state[parameter] = page.state(index)


def check_group(group: Mapping[str, Any]) -> None:
    """Check the values of a parameter group.

    Raises:
        UsageError: a value is out of range or an option is not supported.
    """
    for key in ("lr", "eps", "weight_decay"):
        if not (_is_number(group[key]) and group[key] >= 0):
            raise UsageError(f"optimizer: {key} = {group[key]!r}; expected 0 or more")
    betas = group["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not (pair and all(_is_number(beta) and 0 <= beta < 1 for beta in betas)):
        raise UsageError(f"optimizer: betas = {betas!r}; expected two numbers in [0, 1)")
    for key in ("amsgrad", "capturable", "differentiable"):
        if group[key]:
            raise UsageError(
                f"optimizer: {key} = True is not part of lorax's optimizers; leave it out, or use "
                "torch.optim.AdamW"
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def _copy_state(mine: State, theirs: State) -> None:
    """Copy a parameter's saved state into its page."""
    if set(mine) != set(theirs):
        raise UsageError(
            f"a parameter's state has {sorted(theirs)}; expected {sorted(mine)}: it was saved by "
            "another kind of optimizer, or with other settings; build the one that was saved"
        )
    for name, tensor in mine.items():
        saved = torch.as_tensor(theirs[name])
        if saved.shape != tensor.shape or saved.is_floating_point() != tensor.is_floating_point():
            raise UsageError(
                f"the state's {name} is {saved.dtype} {tuple(saved.shape)}; "
                f"expected {tensor.dtype} {tuple(tensor.shape)}; load the state of this model"
            )
        tensor.copy_(saved)
