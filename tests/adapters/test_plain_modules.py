"""Adapters on modules that are no model of lorax's, against PEFT; what is not finite; the card."""

import json

import peft
import pytest
import torch
import yaml
from peft_pairs import disturb
from torch import nn

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.errors import AdapterError
from lorax.formats.adapter_card import yaml_text


class Tower(nn.Module):
    """An embedding and some Linears, one of them called like a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24, bias=False))
        self.lm_head = nn.Linear(24, 8)

    def forward(self, ids):
        return self.lm_head(self.body(self.table(ids)))


def mlp():
    return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def made(kind):
    torch.manual_seed(0)
    return kind().eval()


CASES = {
    "mlp, all-linear": (mlp, {"target_modules": "all-linear"}),
    "mlp, names": (mlp, {"target_modules": ["1", "3"]}),
    "mlp, an expression": (mlp, {"target_modules": r"[01]"}),
    "mlp, a layer as a whole": (mlp, {"target_modules": ["1"], "modules_to_save": ["3"]}),
    "tower, all-linear": (Tower, {"target_modules": "all-linear"}),
    "tower, embedding": (Tower, {"target_modules": ["table", "body.2"]}),
    "tower, dora": (Tower, {"target_modules": ["body.0"], "use_dora": True}),
    "tower, biases": (Tower, {"target_modules": ["body.0"], "bias": "all"}),
    "tower, pissa": (Tower, {"target_modules": ["body.0"], "init_lora_weights": "pissa"}),
}
IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_a_plain_module_both_ways_against_peft(case, tmp_path):
    kind, settings = CASES[case]
    theirs = peft.get_peft_model(made(kind), peft.LoraConfig(r=4, **settings))
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, base = made(kind), made(kind)
    lorax.load_adapter(mine, tmp_path / "theirs")
    assert torch.allclose(mine(IDS), theirs.eval()(IDS), atol=1e-5)
    assert set(adapter_layers(mine)) == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    lorax.save_adapter(mine, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(made(kind), tmp_path / "mine").eval()
    assert torch.allclose(mine(IDS), again(IDS), atol=1e-5)
    one, two = (
        peft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "mine")
    )
    assert one == two
    adapted = mine(IDS)
    lorax.merge_adapter(mine)
    assert torch.allclose(mine(IDS), adapted, atol=1e-5)
    lorax.unmerge_adapter(mine)
    with lorax.disabled_adapter(mine):
        assert torch.equal(mine(IDS), base(IDS))
    assert lorax.unload_adapter(mine, merge=True) is mine
    assert not adapter_layers(mine)
    assert torch.allclose(mine(IDS), adapted, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_new_adapter_on_a_plain_module_opens_in_peft(case, tmp_path):
    kind, settings = CASES[case]
    mine, base = made(kind), made(kind)
    lorax.add_adapter(mine, lorax.LoRAConfig(r=4, **settings))
    assert torch.allclose(mine(IDS), base(IDS), atol=1e-5)
    assert all(p.requires_grad for m in adapter_layers(mine).values() for p in m.tensors().values())
    disturb(mine)
    lorax.save_adapter(mine, tmp_path)
    theirs = peft.PeftModel.from_pretrained(made(kind), tmp_path).eval()
    assert torch.allclose(mine(IDS), theirs(IDS), atol=1e-5)
    lorax.unload_adapter(mine)
    assert torch.equal(mine(IDS), base(IDS))


def test_a_single_row_and_a_single_token():
    mine = made(Tower)
    lorax.add_adapter(
        mine, lorax.LoRAConfig(target_modules=["table", "lm_head"], init_lora_weights=False)
    )
    assert torch.allclose(mine(IDS[0, 0]), mine(IDS)[0, 0], atol=1e-6)


def test_targets_must_be_given_for_a_plain_module():
    for settings in ({}, {"target_modules": ["no_such"]}):
        with pytest.raises(AdapterError, match="target_modules"):
            lorax.add_adapter(made(mlp), lorax.LoRAConfig(**settings))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_is_not_finite_is_not_merged(value, settings, tmp_path):
    model = made(Tower)
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules=["body.0"], **settings))
    if "modules_to_save" in settings:
        model.lm_head.weight.data[0, 0] = value
    else:
        model.body[0].lora_B.data[0, 0] = value
    before = list(model.named_modules())
    name = "lm_head.weight" if "modules_to_save" in settings else r"body\.0\.lora_B\.weight"
    for refused in (
        lambda: lorax.merge_adapter(model),
        lambda: lorax.unload_adapter(model, merge=True),
        lambda: lorax.save_adapter(model, tmp_path / "a"),
    ):
        with pytest.raises(AdapterError, match=f"{name} is not finite"):
            refused()
    assert [(n, id(m)) for n, m in before] == [(n, id(m)) for n, m in model.named_modules()]


def test_a_merged_weight_beyond_its_dtype_is_refused():
    model = made(Tower).half()
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules=["body.0"], init_lora_weights=False))
    model.body[0].lora_B.data.fill_(1e5)
    model.body[0].lora_A.data.fill_(1.0)
    for merge in (lorax.merge_adapter, lambda m: lorax.unload_adapter(m, merge=True)):
        with pytest.raises(AdapterError, match=r"body\.0.*not finite in float16"):
            merge(model)
    assert set(adapter_layers(model)) == {"body.0"}


@pytest.mark.parametrize("target", ["body.0", "table", "body.2"])
def test_a_fresh_dora_changes_nothing_and_its_report_says_so(target):
    model = made(Tower)
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules=[target], use_dora=True))
    report = lorax.merge_adapter(model)
    assert "changes nothing" in str(report)
    assert report.worst[1] == 0.0
    lorax.unmerge_adapter(model)
    disturb(model)
    assert "rounding moved" in str(lorax.merge_adapter(model))


def saved(folder, name=None):
    model = made(mlp)
    if name is not None:
        model.name_or_path = name
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules=["1"], task_type="CAUSAL_LM"))
    lorax.save_adapter(model, folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def front(text):
    return yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize("mine", ["# My notes\n", "---\nlicense: mit\n---\n# Mine\n", ""])
def test_a_readme_of_the_user_s_own_stays(mine, tmp_path):
    (tmp_path / "README.md").write_text(mine)
    assert saved(tmp_path) == mine


def test_a_card_of_peft_and_one_of_lorax_are_replaced(tmp_path):
    theirs = peft.get_peft_model(made(mlp), peft.LoraConfig(target_modules=["1"]))
    theirs.save_pretrained(tmp_path)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    assert front(saved(tmp_path, "a/b"))["base_model"] == "a/b"
    assert front(saved(tmp_path, "c/d"))["base_model"] == "c/d"
    titled = (tmp_path / "README.md").read_text().replace("# LoRA adapter", "# Mine")
    theirs.save_pretrained(tmp_path / "titled")
    path = tmp_path / "titled" / "README.md"
    titled = path.read_text().replace("# Model Card for Model ID", "# My model")
    path.write_text(titled)
    assert saved(tmp_path / "titled") == titled


@pytest.mark.parametrize(
    "name",
    ["a/b", "/home/me/model", "x: y", "tr'ue", "- a\nb: c", "#no", "true", "1e3", "é", "\x85"],
)
def test_the_base_s_name_is_escaped(name, tmp_path):
    assert front(saved(tmp_path, name))["base_model"] == name
    assert yaml.safe_load(yaml_text(name)) == name


def test_a_nameless_base_is_left_out(tmp_path):
    found = front(saved(tmp_path))
    assert "base_model" not in found
    assert found["tags"] == ["lora", "lorax"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
