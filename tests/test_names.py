"""No name is lost: what commit 930bfd5 offered, before the house was rebuilt, is there or says so.

The lists below are that commit's own (its command line's arguments, its recipe's fields, its
`__all__`, its README's tree), written out; names that came later need not be added.
"""

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

import lorax
from lorax import cli
from lorax.moved import MOVED
from lorax.training import recipe

OPENING = "--base --quantization --dtype --device --check-base --no-check-base"
COMMANDS = {
    "adapter add": "PATHS --output --weights --rank",
    "demo": "--output-dir --steps --model --dtype --device",
    "estimate": "MODEL --method --optimizer --r --target-modules --batch --length --dtype "
    "--quantization --gradient-checkpointing --device --plot --json",
    "evaluate": f"--path --data --max-length --micro-batch-size --json {OPENING}",
    "export": f"PATH OUTPUT --format --type --json {OPENING}",
    "generate": f"--path --prompt --max-new-tokens --temperature --top-p --seed --raw --no-raw "
    f"{OPENING}",
    "inspect adapter": "PATH --against --json",
    "inspect optimizer": "PATH --json",
    "inspect quantization": "MODEL --format --block-size --dtype --tensors --plot --json",
    "merge": f"ADAPTER OUTPUT --report --route --format --residual-rank --text --tokens "
    f"--original --json {OPENING}",
    "quantize": "MODEL OUTPUT --format --block-size --dtype --max-shard-bytes --json",
    "train": "RECIPE --dry-run",
    "verify": "ADAPTER --base --against --reference --quantization --text --tokens --html --json",
}
RECIPE = {
    "model": "path revision dtype device quantization gradient_checkpointing",
    "data": "path eval_path eval_fraction max_length shuffle packing",
    "train": "output_dir epochs max_steps batch_size micro_batch_size learning_rate lr_scheduler "
    "warmup_ratio weight_decay max_grad_norm optimizer adam_beta1 adam_beta2 adam_epsilon "
    "lora_plus_ratio eval_steps save_steps keep_checkpoints early_stopping_patience seed",
}
SHARED = (
    "lora_alpha target_modules exclude_modules lora_dropout fan_in_fan_out bias init_lora_weights "
    "layers_to_transform layers_pattern modules_to_save trainable_token_indices ensure_weight_tying"
)
LORA = f"r {SHARED} use_rslora rank_pattern alpha_pattern use_dora lora_bias loftq_config"
ADALORA = "target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight"
PROMPT = "num_virtual_tokens prompt_tuning_init prompt_tuning_init_text"
METHODS = {
    "lora": LORA, "adalora": f"{SHARED} {ADALORA}", "prompt-tuning": PROMPT, "full": "",
}  # fmt: skip
CONFIGS = {
    "LoRAConfig": LORA,
    "AdaLoRAConfig": f"{LORA} {ADALORA} total_step",
    "PromptTuningConfig": f"{PROMPT} tokenizer_name_or_path tokenizer_kwargs token_dim num_layers "
    "num_attention_heads num_transformer_submodules",
}
VERIFY = "against reference quantization text tokens say"  # by keyword only
FUNCTIONS = {  # name -> its parameters in their order
    "add_adapter": "model config tokenizer",
    "convert_to_lora": "model",
    "disabled_adapter": "model",
    "fold_into_lora": "model",
    "generate": "model tokenizer prompt max_new_tokens temperature top_p seed",
    "load_adapter": "model path trainable check_base check_adapter",
    "load_model": "path dtype device quantization revision",
    "load_tokenizer": "path revision",
    "merge_adapter": "model",
    "print_trainable_parameters": "model",
    "quantize": "weight format block_size name options",
    "read_adapter": "path",
    "save_adapter": "model path plain",
    "save_model": "model path tokenizer max_shard_bytes",
    "train": "recipe listener",
    "unload_adapter": "model merge how",
    "unmerge_adapter": "model",
    "verify": "adapter base",
    "write_adapter": "adapter path",
}
CLASSES = {
    "Adapter": "base of truncate norm plain_config",
    "LoraxError": "exit_code",
    "QuantizedTensor": "format tensors to dequantize state_dict to_bitsandbytes from_bitsandbytes "
    "device nbytes",
    "RankAllocator": "penalty update ranks finish",
    "Recipe": "load from_dict adapter_config to_toml model adapter data train",
    **CONFIGS,
}
ROOMS = "adapters data errors formats inference kernels models optim quant training"
OPTIMIZERS = "AdamW AdamW8bit PagedAdamW PagedAdamW8bit lora_plus_groups"
ERRORS = (
    "LoraxError UsageError RecipeError EnvironmentProblem FormatError DataError TemplateError "
    "UnsupportedModel AdapterError QuantizationError NumericalStop"
)
# README's tree; those that moved are in lorax.moved
MODULES = [
    "quant.codebooks",
    "quant.nearest",
    "quant.blockwise",
    "quant.double",
    "quant.affine",
    "quant.ops",
    "quant.compiled",
    "quant.linear",
    "quant.tensor",
    "quant.formats",
    "quant.nf4",
    "quant.llm_int8",
    "quant.bitsandbytes_layout",
    "adapters.config",
    "adapters.layer",
    "adapters.lora",
    "adapters.embedding",
    "adapters.dora",
    "adapters.inject",
    "adapters.merge",
    "adapters.routes",
    "adapters.residual",
    "adapters.initialize",
    "adapters.started",
    "adapters.convert",
    "adapters.algebra",
    "adapters.replaced",
    "adapters.tokens",
    "adapters.adalora_config",
    "adapters.adalora",
    "adapters.rank_allocator",
    "adapters.prompt_config",
    "adapters.prompt",
    "models.gpt2",
    "models.llama",
    "models.attention",
    "models.prefix",
    "optim.adamw",
    "optim.adamw8bit",
    "optim.flat",
    "optim.fused",
    "optim.memory",
    "optim.paged",
    "optim.unified_memory",
    "optim.lora_plus",
    "data.rows",
    "data.examples",
    "data.batches",
    "data.tokenizer",
    "data.templates",
    "data.template_worker",
    "data.docstrings",
    "training.recipe",
    "training.plan",
    "training.methods",
    "training.loop",
    "training.loss",
    "training.optimizers",
    "training.schedule",
    "training.evaluate",
    "training.metrics",
    "inference.generate",
    "formats.safetensors_files",
    "formats.json_files",
    "formats.directory",
    "formats.model_config",
    "formats.huggingface",
    "formats.tokenizer_files",
    "formats.gguf_files",
    "formats.peft",
    "formats.peft_directory",
    "formats.open_model",
    "formats.fingerprint",
    "formats.optimizer_files",
    "formats.bitsandbytes",
    "formats.quantize_model",
    "formats.merged_model",
    "formats.adapter_data",
    "verify",
    "verify.quantization",
    "verify.optimizer",
    "verify.adapter",
    "verify.merging",
    "verify.merge_costs",
    "verify.merge_report",
    "verify.against_peft",
    "verify.sides",
    "verify.compare",
    "verify.difference",
    "verify.causes",
    "verify.report",
    "cli",
    "progress",
    "demo",
    "errors",
    "heap",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_no_command_or_option_is_lost(words):
    command = cli.app
    for word in words.split():
        command = command[word]
    taken = {n for a in command.assemble_argument_collection() if a.show for n in a.names}
    assert set(COMMANDS[words].split()) <= taken


@pytest.mark.parametrize("section", RECIPE)
def test_no_key_of_a_recipe_is_lost(section):
    assert set(RECIPE[section].split()) <= set(
        recipe.Recipe.model_fields[section].annotation.model_fields
    )


@pytest.mark.parametrize("method", METHODS)
def test_no_key_of_a_method_is_lost(method):
    needed = {"num_virtual_tokens": 1} if method == "prompt-tuning" else {}
    made = recipe.Recipe.from_dict(
        {
            "model": {"path": "model"},
            "adapter": {"method": method, **needed},
            "data": {"path": "rows.jsonl"},
            "train": {"output_dir": "run"},
        }
    )
    assert set(METHODS[method].split()) <= set(type(made.adapter).model_fields)


def test_no_public_name_is_lost():
    assert {*FUNCTIONS, *CLASSES} <= set(lorax.__all__)
    assert all(getattr(lorax, room).__name__ == f"lorax.{room}" for room in ROOMS.split())
    assert set(OPTIMIZERS.split()) <= set(lorax.optim.__all__)
    assert all(issubclass(getattr(lorax.errors, e), lorax.LoraxError) for e in ERRORS.split())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_parameters_have_their_names_and_places(name):
    was = FUNCTIONS[name].split()
    assert list(inspect.signature(getattr(lorax, name)).parameters)[: len(was)] == was
    if name == "verify":
        assert set(VERIFY.split()) <= inspect.signature(lorax.verify).parameters.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_its_members(name):
    kind = getattr(lorax, name)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(getattr(kind, "model_fields", ()))
    assert [m for m in CLASSES[name].split() if m not in fields and not hasattr(kind, m)] == []


# Modules -------------------------------------------------------------------------------------


@pytest.fixture
def afresh():
    """Old paths are imported anew in a test, and leave nothing behind."""
    yield
    for name in [name for name in sys.modules if name.removeprefix("lorax.") in MOVED]:
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        vars(sys.modules.get(parent, lorax)).pop(child, None)


@pytest.mark.parametrize("name", MODULES)
def test_each_module_of_the_old_tree_imports_and_the_moved_ones_say_where_to(name, afresh):
    if name not in MOVED:
        importlib.import_module(f"lorax.{name}")
        return
    with pytest.warns(DeprecationWarning, match=f"is now lorax.{MOVED[name][0]}"):
        old = importlib.import_module(f"lorax.{name}")
    for now in MOVED[name]:
        new = importlib.import_module(f"lorax.{now}")
        own = [n for n, v in vars(new).items() if getattr(v, "__module__", "") == new.__name__]
        assert own
        assert all(hasattr(old, n) for n in own)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = old.no_such_name


def test_names_by_their_old_paths(afresh):
    names = {}
    code = """
from lorax.adapters.algebra import Adapter
from lorax.adapters.initialize import loftq
from lorax.quant.formats import from_state_dict, quantize
from lorax.verify import merging
from lorax.verify.against_peft import verify
"""
    with pytest.warns(DeprecationWarning, match="the old name goes with the next version"):
        exec(code, names)  # noqa: S102 - as another program has it
    merging, verify = names["merging"], names["verify"]
    assert (names["Adapter"], names["quantize"]) == (lorax.Adapter, lorax.quantize)
    assert names["from_state_dict"].__module__ == "lorax.quant.state_dict"
    assert names["loftq"].__module__ == "lorax.adapters.loftq"
    assert merging.Laboratory.__module__ == "lorax.merging.laboratory"
    assert lorax.verify.verify is verify
    with pytest.raises(lorax.LoraxError):  # the room is still callable
        lorax.verify("no-such-adapter")


def test_nothing_of_lorax_uses_an_old_path():
    """A process of its own, in which these warnings are errors."""
    code = "import lorax, lorax.cli; [getattr(lorax, name) for name in lorax.__all__]"
    words = [sys.executable, "-W", "error::DeprecationWarning:lorax", "-c", code]
    subprocess.run(words, check=True)
