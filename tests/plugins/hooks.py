"""A step hook in a file of one's own: the norm of what is trained, and a count that is kept."""

import torch

import lorax


class LogNorms(lorax.StepHook):
    """Writes the trained tensors' norm, and its mean over all steps, into metrics.jsonl."""

    def __init__(self, model):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.steps, self.total = 0, torch.zeros(())

    def after_step(self):
        norm = torch.cat([p.detach().flatten() for p in self.trained]).norm()
        self.steps, self.total = self.steps + 1, self.total + norm
        return {"norm": norm.item(), "mean_norm": (self.total / self.steps).item()}

    def state(self):
        return {"steps": self.steps}, {"total": self.total}

    def load_state(self, numbers, tensors):
        self.steps, self.total = numbers["steps"], tensors["total"]


lorax.register_step_hook("log-norms", LogNorms)
