"""A plugin's variant inherits LoRAConfig's fields: what its layer does not compute is refused."""

import json
import tomllib
from dataclasses import dataclass, field

import pytest
import torch
from command_line import complete_lorax, run_lorax
from runs import make_folder, recipe
from torch import nn
from torch.nn.functional import normalize

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.adapters.dora import DoRALinear
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.adapters.variants import Variant
from lorax.errors import AdapterError, PluginError, RecipeError


@dataclass(frozen=True)
class UnitConfig(lorax.LoRAConfig):
    r: int = 3
    use_rslora: bool = True
    sharpness: float = 0.25
    peft_type: str = field(default="UNIT", kw_only=True)


class UnitLinear(LoRALinear):
    def factors(self, dtype=None):
        return normalize(self.lora_A, dim=1).to(dtype), self.lora_B.to(dtype)


@dataclass(frozen=True)
class GainConfig(lorax.LoRAConfig):
    peft_type: str = field(default="GAIN", kw_only=True)


class GainLinear(AdapterLayer):
    """A factor for each output; it has no rank."""

    def __init__(self, base):
        super().__init__(base)
        self.lora_gain = nn.Parameter(torch.ones(base.out_features))

    @classmethod
    def wrap(cls, base, name, config, shared):
        return cls(base)

    def initialize(self, how):
        nn.init.ones_(self.lora_gain)

    def adapted(self, x):
        return self.base_layer(x) * self.lora_gain

    def tensors(self):
        return {"lora_gain": self.lora_gain}

    def effective_weight(self, dtype=torch.float32):
        return self.base_weight().to(dtype) * self.lora_gain.detach()[:, None].to(dtype)


@dataclass(frozen=True)
class OwnDoRAConfig(lorax.LoRAConfig):
    use_dora: bool = True
    peft_type: str = field(default="OWN_DORA", kw_only=True)


class OwnDoRALinear(DoRALinear):
    """DoRA as it is, under another name."""


NO_RANK = frozenset({"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for name, config, layer, unused in (
        ("unit", UnitConfig, UnitLinear, frozenset()),
        ("gain", GainConfig, GainLinear, NO_RANK),
        ("own-dora", OwnDoRAConfig, OwnDoRALinear, frozenset()),
    ):
        variant = Variant(
            name, config, name.title(), lambda config: f"rank {config.r}", layer, unused=unused
        )
        lorax.register_variant(variant)
    return make_folder(tmp_path_factory.mktemp("unused"))


CHOICES = [
    (UnitConfig, {"use_dora": True}, "use_dora = True: Unit (variant 'unit') is no DoRA"),
    (UnitConfig, {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': Unit"),
    (UnitConfig, {"init_lora_weights": "olora"}, "init_lora_weights = 'olora': Unit"),
    (UnitConfig, {"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq': Unit"),
    (GainConfig, {"use_rslora": True}, "use_rslora = True: Gain (variant 'gain') is no rsLoRA"),
    (GainConfig, {"lora_bias": True}, "lora_bias = True: Gain (variant 'gain') is no lora_bias"),
    (GainConfig, {"use_dora": True}, "use_dora = True: Gain (variant 'gain') is no DoRA"),
]
FIELDS = [
    (GainConfig, {"lora_alpha": 32}, "lora_alpha = 32: Gain (variant 'gain') does not use it"),
    (GainConfig, {"lora_dropout": 0.5}, "lora_dropout = 0.5: Gain"),
    (GainConfig, {"rank_pattern": {"q_proj": 4}}, "rank_pattern = {'q_proj': 4}: Gain"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), CHOICES + FIELDS)
def test_a_config_that_asks_for_it_is_refused_by_name(folder, kind, changes, words):
    model = lorax.load_model(folder / "model")
    config = kind(target_modules=["q_proj"], **changes)
    with pytest.raises(AdapterError) as caught:
        lorax.add_adapter(model, config)
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith("; leave it out")
    assert not adapter_layers(model)


@pytest.mark.parametrize(("kind", "changes", "words"), CHOICES)
def test_a_recipe_that_asks_for_it_is_refused_before_anything_is_loaded(
    folder, tmp_path, kind, changes, words
):
    method = {UnitConfig: "unit", GainConfig: "gain"}[kind]
    with pytest.raises(RecipeError) as caught:
        recipe(folder, tmp_path, {"method": method, **changes})
    assert str(caught.value).startswith(f"recipe: adapter: {words}")


def test_an_unused_field_is_no_key_of_a_recipe(folder, tmp_path):
    assert not NO_RANK & set(dict(recipe(folder, tmp_path, {"method": "gain"}).adapter))
    with pytest.raises(RecipeError, match=r"adapter\.lora_alpha belongs to method lora.*'gain'"):
        recipe(folder, tmp_path, {"method": "gain", "lora_alpha": 4})


def test_a_file_that_asks_for_it_is_refused(folder, tmp_path):
    model = lorax.load_model(folder / "model")
    lorax.add_adapter(model, GainConfig(target_modules=["q_proj"]))
    lorax.save_adapter(model, tmp_path / "saved")
    again = lorax.load_model(folder / "model")
    lorax.load_adapter(again, tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"
    for changes in ({"lora_alpha": 3}, {"use_dora": True}):
        text = file.read_text()
        file.write_text(json.dumps(json.loads(text) | changes))
        model = lorax.load_model(folder / "model")
        with pytest.raises(AdapterError, match=f"{next(iter(changes))} = .*Gain"):
            lorax.load_adapter(model, tmp_path / "saved", check_adapter=False)
        file.write_text(text)


def test_what_the_layer_is_made_from_it_computes(folder):
    """rsLoRA's scaling and B's bias in a layer made from LoRA's; DoRA in one made from DoRA's."""
    for config in (
        UnitConfig(target_modules=["q_proj"], lora_alpha=6),
        UnitConfig(target_modules=["q_proj"], use_rslora=False, lora_bias=True),
        OwnDoRAConfig(target_modules=["q_proj"]),
    ):
        model = lorax.load_model(folder / "model")
        lorax.add_adapter(model, config)
        layer = next(iter(adapter_layers(model).values()))
        assert type(layer) is {UnitConfig: UnitLinear, OwnDoRAConfig: OwnDoRALinear}[type(config)]
        assert layer.scaling == config.scaling("q_proj")


@pytest.mark.usefixtures("no_picture")
def test_its_own_defaults_show_in_the_dry_run_the_run_and_the_file(folder, tmp_path):
    settings = {"method": "unit", "target_modules": ["q_proj"]}
    made = recipe(folder, tmp_path / "run", settings, **{"train.max_steps": 1})
    (tmp_path / "recipe.toml").write_text(made.to_toml())
    said = run_lorax("train", tmp_path / "recipe.toml", "--dry-run")
    shown = tomllib.loads(said.split("\n#")[0])["adapter"]
    assert (shown["r"], shown["use_rslora"], shown["sharpness"]) == (3, True, 0.25)
    assert "# rank 3; the run leaves" in said
    run_lorax("train", tmp_path / "recipe.toml")
    stated = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["adapter"]
    assert stated == shown
    file = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (file["r"], file["use_rslora"], file["sharpness"]) == (3, True, 0.25)
    assert (
        "rank 3. lorax loads it, with its plugin"
        in (tmp_path / "run" / "adapter" / "README.md").read_text()
    )


def test_the_command_line_says_it_in_one_line(folder, tmp_path):
    made = recipe(folder, tmp_path / "run", {"method": "unit"})
    (tmp_path / "recipe.toml").write_text(made.to_toml())
    done = complete_lorax("train", tmp_path / "recipe.toml", "--adapter.use_dora", "true")
    assert done.returncode == 2
    assert "adapter: use_dora = True: Unit (variant 'unit') is no DoRA" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_variant_cannot_name_what_its_config_lacks():
    @dataclass(frozen=True)
    class Config(lorax.LoRAConfig):
        peft_type: str = field(default="LACKS", kw_only=True)

    with pytest.raises(AdapterError, match="'lora_alhpa', no field; did you mean 'lora_alpha'"):
        lorax.register_variant(
            Variant("lacks", Config, "L", str, UnitLinear, unused=frozenset({"lora_alhpa"}))
        )


def test_a_field_of_no_type_for_a_recipe_is_named(folder, tmp_path):
    @dataclass(frozen=True)
    class Config(lorax.LoRAConfig):
        device: torch.device | None = None
        peft_type: str = field(default="ODD", kw_only=True)

    lorax.register_variant(Variant("odd", Config, "Odd", str, UnitLinear))
    try:
        with pytest.raises(PluginError, match="variant 'odd': its config's fields are no keys"):
            recipe(folder, tmp_path, {"method": "odd"})
    finally:
        from lorax.adapters import variants

        del variants._table["odd"]  # else no recipe of this module can be made any more
