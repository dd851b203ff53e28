"""Whether somebody outside stands at a module: then it has to be called, and by its own forward."""

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether a hook, or a forward that was put on this instance, sees or changes what it computes.

    What computes in a module's place asks this first. Programs that move weights about (accelerate)
    put a forward on the instance; so does lorax/training/fast, whose own does not count here.
    """
    own = vars(module).get("forward")
    from_outside = own is not None and not getattr(own, "__module__", "").startswith("lorax.")
    return from_outside or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
