"""A step hook of somebody's own that gives what a run cannot use: one line, before it harms."""

import json

import pytest
import torch
from runs import make_folder, recipe
from safetensors.torch import load_file, save

import lorax
from lorax.errors import PluginError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("hooks"))


def trained(folder, tmp_path, *hooks, **methods):
    made = type("Mine", (lorax.StepHook,), methods)() if methods else None
    settings = {"train.max_steps": 1, "train.eval_steps": None, "data.eval_fraction": 0.0}
    return lorax.train(
        recipe(folder, tmp_path / "run", **settings), hooks=[*([made] if made else []), *hooks]
    )


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"penalty": lambda self: 0.5}, r"penalty gives 0\.5; expected a \(\) tensor with a grad"),
        ({"penalty": lambda self: torch.zeros(())}, "penalty gives .*; expected a"),
        ({"penalty": lambda self: torch.zeros(3, requires_grad=True)}, "penalty gives .*expected"),
        ({"after_step": lambda self: None}, r"after_step gives None; expected \{name: number\}"),
        ({"after_step": lambda self: {"x": torch.ones(())}}, r"after_step gives .*tensor\.item"),
        ({"after_step": lambda self: {"loss": 1.0}}, "gives 'loss', which the run writes itself"),
        ({"after_step": lambda self: 1 / 0}, r"after_step failed|<lambda> failed .*ZeroDivision"),
        ({"state": lambda self: {}}, r"state gives \{\}; expected \(\{name: number\}, \{name: t"),
        ({"state": lambda self: ({"x": torch.ones(())}, {})}, "state gives .*; expected"),
        ({"state": lambda self: ({3: 1}, {})}, "state gives .*; expected"),
    ],
)
@pytest.mark.usefixtures("no_picture")
def test_what_cannot_be_used_is_named(folder, tmp_path, methods, said):
    with pytest.raises(PluginError, match=said) as caught:
        trained(folder, tmp_path, **methods)
    assert "given-0" in str(caught.value)


@pytest.mark.usefixtures("no_picture")
def test_two_hooks_with_one_name_for_a_number(folder, tmp_path):
    class Norm(lorax.StepHook):
        def after_step(self):
            return {"norm": 1.0}

    assert trained(folder, tmp_path / "one", Norm()).metrics[-1]["norm"] == 1.0
    with pytest.raises(PluginError, match="gives 'norm', which another hook gives too"):
        trained(folder, tmp_path / "two", Norm(), Norm())


def test_the_loss_is_that_of_a_family_s_own_logits(folder):
    from lorax.models.llama import Llama
    from lorax.training.loss import summed_loss

    class Scaled(Llama):
        def logits(self, hidden):
            return super().logits(hidden) * 0.25

    model = lorax.load_model(folder / "model", "float32")
    ids = torch.randint(0, 200, (2, 9))
    plain = summed_loss(model, ids, ids)
    model.__class__ = Scaled
    found = summed_loss(model, ids, ids)
    logits = model(ids)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(found, expected)
    assert abs(found - plain) > 0.1


@pytest.mark.usefixtures("no_picture")
def test_equal_runs_leave_equal_files(folder, tmp_path):
    """safetensors orders its metadata by a hash that each file draws anew."""
    settings = {"train.max_steps": 1, "train.eval_steps": None, "data.eval_fraction": 0.0}
    metadata = {f"key {n}": "" for n in range(9)}
    assert len({save({}, metadata) for _ in range(9)}) > 1  # in one process, too
    files = []
    for name in ("one", "two"):
        lorax.train(recipe(folder, tmp_path / name, **settings))
        files.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    one, two = files
    assert one == two
    header = json.loads(one[8 : 8 + int.from_bytes(one[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert len(header["__metadata__"]) > 1


@pytest.mark.usefixtures("no_picture")
def test_what_a_layer_trains_and_does_not_save_is_refused(folder, tmp_path):
    from lorax.adapters.lora import LoRALinear

    settings = {"train.max_steps": 2, "train.save_steps": 1, "data.eval_fraction": 0.0}
    made = recipe(folder, tmp_path / "run", **settings, **{"train.eval_steps": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRALinear, "tensors", lambda self: {"lora_A.weight": self.lora_A})
        with pytest.raises(lorax.LoraxError, match=r"lora_B is trained, and LoRALinear\.tensors"):
            lorax.train(made)
    init = LoRALinear.__init__

    def with_buffers(self, *arguments, **options):
        init(self, *arguments, **options)
        whole = torch.ones(8)
        self.register_buffer("first", whole[:4], persistent=False)
        self.register_buffer("second", whole[4:], persistent=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRALinear, "__init__", with_buffers)
        made = recipe(folder, tmp_path / "two", **settings, **{"train.eval_steps": None})
        lorax.train(made)
    kept = tmp_path / "two" / "checkpoints" / "step-00000001" / "trained.safetensors"
    assert not any("first" in name for name in load_file(kept))
