"""Names as PEFT's fields: exact, and quick for PEFT to match."""

import re

from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from rankscope.lora.config import name_fields, names_regex, value_patterns

parts = st.sampled_from(["a", "b", "0", "1", "11", "a_b", "a+", "(b", "^", "ab"])
names = st.lists(st.lists(parts, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True)


@given(named=names, others=names)
def test_the_regex_matches_the_names_and_no_others(named: list[str], others: list[str]) -> None:
    pattern = re.compile(names_regex(named))
    assert {name for name in {*named, *others} if pattern.fullmatch(name)} == set(named)


@given(named=names, others=names)
def test_peft_adapts_the_names_and_no_others(named: list[str], others: list[str]) -> None:
    config = LoraConfig(**name_fields(named))
    present = {*named, *others, *(f"x.{name}" for name in named), *(f"{name}.x" for name in named)}
    found = {n for n in present if (m := check_target_module_exists(config, n)) and "Excluded" not in type(m).__name__}
    assert found == set(named)


@given(values=st.dictionaries(names.map(lambda n: n[0]), st.integers(1, 4), min_size=1))
def test_peft_finds_each_value_by_one_pattern_for_all_that_share_it(values: dict[str, int]) -> None:
    patterns = value_patterns(values, default=2)
    assert {name: patterns.get(get_pattern_key(list(patterns), name), 2) for name in values} == values
    assert len(patterns) == len(set(values.values()) - {2})
    assert not any(re.match(rf"(.*\.)?({key})$", f"x.{name}") for key in patterns for name in values)


def test_a_deep_model_takes_few_letters() -> None:
    layers = [f"model.layers.{i}.{m}" for i in range(300) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1")]
    assert len(names_regex(layers)) < 5 * 300
