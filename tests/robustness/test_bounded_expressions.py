"""A stranger's regular expressions: PEFT's answer, or refused in seconds (case 82)."""

import json
import time

import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorax.adapters import matching
from lorax.adapters.config import LoRAConfig
from lorax.errors import AdapterError

NAMES = [
    f"model.layers.{i}.{part}"
    for i in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.qx_proj")
]
BURNING = [
    "([a-z._0-9]+)+!",
    "(.|.)" * 30 + "!",
    ".*" * 14 + "!",
    r"(\w*\.?)*\d!",
    "(?i)" + r"[\0-\U0010ffff]" * 1000,
]


@pytest.mark.parametrize(
    ("key", "expression"),
    [
        *(("target_modules", expression) for expression in BURNING),
        *((key, BURNING[0]) for key in ("exclude_modules", "rank_pattern", "modules_to_save")),
    ],
    ids=lambda text: text[:20],
)
def test_an_expression_that_burns_time_is_refused(key, expression):
    value = {"rank_pattern": {expression: 2}, "modules_to_save": [expression]}.get(key, expression)
    started = time.process_time(), time.monotonic()

    def use():
        config = LoRAConfig(**{"target_modules": ["q_proj"], key: value})
        return [config.selects(name) and config.rank(name) for name in NAMES]

    with pytest.raises(AdapterError) as caught:
        use()
    assert time.process_time() - started[0] < 1
    assert time.monotonic() - started[1] < 15  # on a busy machine
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q|o)_proj",
        r"model\.layers\.(0|11)\.mlp\..*",
        r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp))",
        r"(?i).*Q_PROJ",
        "model.layers.1.mlp.up_proj",
        r"model.layers.1\d?.mlp.up_proj",
        r"(?=.*q_proj).*",
    ],
)
def test_target_modules_against_peft(expression):
    from peft import LoraConfig

    theirs = LoraConfig(target_modules=expression)
    mine = LoRAConfig(target_modules=expression)
    for name in NAMES:
        assert mine.selects(name) == bool(check_target_module_exists(theirs, name)), name


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "layers.1.mlp.up_proj",
        r"layers\.1\.",
        "q.proj",
        r".*\.1\..*",
        "mlp.*",
        "(q|o)_proj",
    ],
)
def test_rank_pattern_against_peft(key):
    config = LoRAConfig(r=8, target_modules="all-linear", rank_pattern={key: 3})
    for name in NAMES:
        expected = {key: 3}.get(get_pattern_key([key], name), 8)
        assert config.rank(name) == expected, name


@pytest.mark.parametrize(
    "expression", ["(" * 5000, "a{99999999999}", "x+" * 20_000, "[", "(?P<1>a)"]
)
def test_a_broken_or_endless_expression_is_refused(expression):
    with pytest.raises(AdapterError, match="regular expression") as caught:
        LoRAConfig(target_modules=expression)
    assert len(str(caught.value)) <= 2000


def test_many_slow_expressions_are_slow_together_no_longer_than_one():
    slow = [r"(\w*\.?)" + "{" + f"{n}" + "}!" for n in range(3, 40)]
    started = time.monotonic()
    with pytest.raises(AdapterError, match="takes more than"):
        _ = [matching.matches_whole(e, name) for name in NAMES * 20 for e in slow]
    assert time.monotonic() - started < 20
    with pytest.raises(AdapterError, match="1001 regular expressions"):
        LoRAConfig(target_modules=["x"], rank_pattern={f"a{i}+": 2 for i in range(1001)})


def test_after_a_refusal_the_next_expression_is_matched():
    with pytest.raises(AdapterError, match="takes more than"):
        matching.matches_whole(BURNING[0], NAMES[0])
    assert matching.matches_whole(".*q_proj", NAMES[0])


def test_loftq_goes_around_a_bounded_number_of_times():
    for times in (10**9, 101, 0, -1, 1.5, True):
        with pytest.raises(AdapterError, match="loftq_iter"):
            LoRAConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": times})
    assert json.dumps(
        LoRAConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 100}).loftq_config
    )
