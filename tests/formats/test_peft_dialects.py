"""Configs as other programs, other PEFTs and notebooks write them, against the installed PEFT."""

import copy
import dataclasses
import json
import logging
import warnings

import peft
import pytest
import torch
from oracles import llama, peft_model
from peft import LoraConfig, PeftModel
from peft_pairs import config_as_read, in_peft, largest_difference, logits, save

import lorax
from lorax.adapters.config import LoRAConfig
from lorax.adapters.short_names import shortest_names
from lorax.errors import AdapterError, FormatError

Q = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
# The fields of LoraConfig in peft 0.10.0, read from its source.
PEFT_0_10 = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, PEFT's model): folder/base and folder/a, a plain LoRA as PEFT writes it."""
    folder = tmp_path_factory.mktemp("dialects")
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(folder / "base")
    theirs = peft_model(base, **Q)
    theirs.save_pretrained(folder / "a")
    return folder, theirs


def edited(written, tmp_path, **changes):
    """A copy of the adapter with other keys in its config; ... takes a key out."""
    folder, _ = written
    for file in (folder / "a").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return tmp_path


def as_peft_loads(folder, base, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that it passes over
        return PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()


DIALECTS = {
    "axolotl": {"fan_in_fan_out": None, "target_parameters": [], "layers_pattern": None},
    "unsloth": {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "task_type": "CAUSAL_LM",
        "corda_config": None,
        "eva_config": None,
    },
    "ms-swift": {"lora_dtype": "AUTO", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},
    "peft 0.2": {
        "merge_weights": False, "enable_lora": None, "use_rslora": ..., "use_dora": ...,
        "rank_pattern": ..., "alpha_pattern": ..., "peft_version": ..., "lora_bias": ...,
    },
    "a notebook's empties": {
        "loftq_config": None, "eva_config": {},
        "trainable_token_indices": None, "modules_to_save": [], "exclude_modules": [],
        "layers_to_transform": None, "megatron_config": {}, "layer_replication": [],
    },
    "a later peft": {"use_future_variant": False, "future_notes": "of the author", "qalora": None},
    "null where peft has a default": {"use_rslora": None, "use_dora": None, "lora_bias": None},
    "settings of a start": {"eva_config": {"rho": 2.0, "tau": 0.99}, "loftq_config": {"x": 1}},
    "runtime": {"runtime_config": {"ephemeral_gpu_offload": True}, "revision": "main"},
    "gaussian in capitals": {"init_lora_weights": "Gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_loads_against_peft(dialect, written, tmp_path):
    folder, theirs = written
    adapter = edited(written, tmp_path, **DIALECTS[dialect])
    again = as_peft_loads(folder, llama_of(folder), adapter)
    mine = lorax.load_model(folder / "base")
    lorax.load_adapter(mine, adapter)
    assert largest_difference(mine, again) <= 1e-5
    assert largest_difference(mine, theirs) <= 1e-5


def llama_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "base")


@pytest.mark.parametrize("how", ["orthogonal", "eva", "mica", "lora_ga", None, False, "gaussian"])
def test_a_start_that_is_settled_loads_against_peft(how, written, tmp_path, caplog):
    folder, _ = written
    adapter = edited(written, tmp_path, init_lora_weights=how)
    again = as_peft_loads(folder, llama_of(folder), adapter)
    mine = lorax.load_model(folder / "base")
    with caplog.at_level(logging.WARNING, "lorax"):
        config = lorax.load_adapter(mine, adapter)
    assert largest_difference(mine, again) <= 1e-5
    assert config.init_lora_weights == (False if how is None else how)
    assert ("lora_ga took its start out of the base" in caplog.text) == (how == "lora_ga")


def test_starts_that_lorax_does_not_make_are_refused_for_a_new_adapter(written):
    folder, _ = written
    model = lorax.load_model(folder / "base")
    for how in ("orthogonal", "eva", "mica", "lora_ga", "corda"):
        with pytest.raises(AdapterError, match="starts none"):
            lorax.add_adapter(model, LoRAConfig(**Q, init_lora_weights=how))


def test_corda_is_refused_as_in_peft(written, tmp_path):
    folder, _ = written
    adapter = edited(written, tmp_path, init_lora_weights="corda")
    with pytest.raises(ValueError, match="eigens"):
        as_peft_loads(folder, llama_of(folder), adapter)
    with pytest.raises(AdapterError, match="corda takes its start out of the base"):
        lorax.load_adapter(lorax.load_model(folder / "base"), adapter)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"use_a_later_variant": True}, "use_a_later_variant"),
        ({"later_config": {"k": 2}}, "later_config"),
        ({"lora_alpa": 32}, "did you mean lora_alpha"),
        ({"enable_lora": [True, False, True]}, "enable_lora"),
    ],
)
def test_a_key_that_would_change_the_result_is_refused(changes, word, written, tmp_path):
    model = lorax.load_model(written[0] / "base")
    with pytest.raises(AdapterError, match=word):
        lorax.load_adapter(model, edited(written, tmp_path, **changes))


LACKING = {
    "targets of many families": {"target_modules": ["q_proj", "c_attn", "W_pack"]},
    "a classifier": {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
    "a rank": {"target_modules": ["q_proj"], "rank_pattern": {"vision.q_proj": 2}},
    "an alpha": {"target_modules": ["q_proj"], "alpha_pattern": {"^q_proj": 100}},
    "an exclusion": {"target_modules": ["q_proj"], "exclude_modules": ["vision"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 40]},
}


@pytest.mark.parametrize("case", LACKING)
def test_names_that_the_base_lacks_against_peft(case, tmp_path, caplog):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    theirs = in_peft(base, r=4, **LACKING[case])
    save(theirs, tmp_path / "a")
    mine = lorax.load_model(tmp_path / "base")
    with caplog.at_level(logging.WARNING, "lorax"):
        lorax.load_adapter(mine, tmp_path / "a")
    assert largest_difference(mine, theirs) <= 1e-5
    lines = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    named = {"targets of many families": "W_pack", "a classifier": "score", "a rank": "vision"}
    assert len(lines) == (case in (*named, "an alpha"))
    assert named.get(case, "") in "".join(lines)
    lorax.save_adapter(mine, tmp_path / "mine")
    assert config_as_read(tmp_path / "mine") == config_as_read(tmp_path / "a")
    if lines:  # a new adapter with such names is a mistake
        lorax.unload_adapter(mine)
        with pytest.raises(AdapterError, match="match"):
            lorax.add_adapter(mine, LoRAConfig(r=4, **LACKING[case]))


def test_every_keyword_of_peft_is_taken():
    fields = {each.name for each in dataclasses.fields(LoraConfig)}
    assert fields <= {each.name for each in dataclasses.fields(LoRAConfig)}
    config = LoRAConfig(
        task_type=peft.TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32,
        peft_type=peft.PeftType.LORA, base_model_name_or_path="a/b", revision="main",
        auto_mapping=None, megatron_core="megatron.core", qalora_group_size=16,
        runtime_config=peft.LoraRuntimeConfig(), target_modules={"q_proj"}, bias="none",
    )  # fmt: skip
    assert (config.task_type, config.peft_type, config.revision) == ("CAUSAL_LM", "LORA", "main")
    assert config == LoRAConfig(r=8, lora_alpha=32, target_modules=["q_proj"])


@pytest.mark.parametrize(
    "keyword", ["use_qalora", "velora_config", "target_parameters", "alora_invocation_tokens"]
)
def test_a_keyword_that_is_not_covered_refuses_by_name(keyword):
    LoRAConfig(**{keyword: [] if keyword != "use_qalora" else False})
    with pytest.raises(AdapterError, match=keyword):
        LoRAConfig(**{keyword: True if keyword == "use_qalora" else ["x"]})


def test_defaults_are_peft_s():
    theirs = LoraConfig(target_modules=["q_proj"]).to_dict()
    mine = dataclasses.asdict(LoRAConfig(target_modules=["q_proj"]))
    apart = {"peft_version", "target_modules"}  # filled in there, a set there
    assert set(theirs) - set(mine) == set()
    assert {k: mine[k] for k in theirs if k not in apart} == {
        k: v for k, v in theirs.items() if k not in apart
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}, "modules_to_save": ["norm"]},
    ],
)
def test_an_older_peft_knows_every_key_that_is_written(settings, written, tmp_path):
    model = lorax.load_model(written[0] / "base")
    lorax.add_adapter(model, LoRAConfig(r=4, task_type="CAUSAL_LM", **settings))
    lorax.save_adapter(model, tmp_path / "a")
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(values) <= PEFT_0_10
    assert values["task_type"] == "CAUSAL_LM"
    assert values["inference_mode"] is True


def test_all_linear_is_written_as_short_as_peft_writes_it(tmp_path):
    """21 paths become seven names; in a model of 14 they stay, in both."""
    for layers, count in ((3, 7), (2, 14)):
        base = llama(num_hidden_layers=layers)
        base.save_pretrained(tmp_path / "base")
        peft_model(base, target_modules="all-linear").save_pretrained(tmp_path / "theirs")
        mine = lorax.load_model(tmp_path / "base")
        lorax.add_adapter(mine, LoRAConfig(target_modules="all-linear", init_lora_weights=False))
        lorax.save_adapter(mine, tmp_path / "mine")
        found = config_as_read(tmp_path / "mine")["target_modules"]
        assert found == config_as_read(tmp_path / "theirs")["target_modules"]
        assert len(found) == count
        again = as_peft_loads(tmp_path, base, tmp_path / "mine")
        assert largest_difference(mine, again) <= 1e-5
        back = lorax.load_model(tmp_path / "base")
        lorax.load_adapter(back, tmp_path / "mine")
        assert torch.equal(logits(back), logits(mine))


@pytest.mark.parametrize("seed", range(20))
def test_shortest_names_against_peft(seed):
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (1,), generator=generator))

    paths = {".".join("abcd"[draw(4)] for _ in range(1 + draw(4))) for _ in range(40)}
    targets = {path for path in sorted(paths) if draw(2)} or paths
    assert set(shortest_names(targets, paths - targets)) == _find_minimal_target_modules(
        targets, paths - targets
    )


def test_a_pickle_is_refused_with_the_lines_that_convert_it(written, tmp_path):
    folder, _ = written
    adapter = edited(written, tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"PeftModel\.from_pretrained\(.*save_pretrained\("):
        lorax.load_adapter(lorax.load_model(folder / "base"), adapter)


@pytest.mark.parametrize("base", ["../no/such/base", "/no/such/base"])
def test_a_base_that_is_not_there_names_the_option(base, written, tmp_path):
    from lorax.formats.open_model import open_model
    from lorax.merging.laboratory import open_laboratory

    adapter = edited(written, tmp_path, base_model_name_or_path=base)
    for opens in (open_model, open_laboratory):
        with pytest.raises(lorax.LoraxError, match="--base"):
            opens(str(adapter))
