"""Names as PEFT's fields: exact, and quick for PEFT to match."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import rankscope as rs
from rankscope.lora import config as lora_config
from rankscope.lora.config import first_matches, from_lora_config, name_fields, names_regex, value_patterns

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


@given(named=names, others=names, most=st.integers(1, 3))
def test_many_names_are_told_apart_by_their_letters(named: list[str], others: list[str], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_config, "MOST_ALTERNATIVES", most)
        pattern = re.compile(names_regex(named))
    assert {name for name in {*named, *others} if pattern.fullmatch(name)} == set(named)


# Plain names, with dots for any character and escaped ones, regexes, and such with groups and flags of their own.
keys = st.one_of(
    st.lists(st.sampled_from(["a", "b", "0", "a_b", "."]), min_size=1, max_size=4).map(".".join),
    st.lists(st.sampled_from(["a", "b", "0", "ab"]), min_size=1, max_size=3).map(r"\.".join),
    st.sampled_from(
        ["a|b", "^a.b", "^(?:a|b)", "(a|b)", r"(a)\.\3", "(?i:A)", "(?:a.)?b", "a$", ".*", "[ab]+", r"\w\.b"]
    ),
)


@given(patterns=st.lists(keys, max_size=8, unique=True), names=names)
def test_the_first_pattern_is_the_one_that_peft_finds(patterns: list[str], names: list[str]) -> None:
    expected = {name: key for name in names if (key := get_pattern_key(patterns, name)) in patterns}
    by_chance = {name for name in names if name in patterns}  # PEFT gives the name itself where none matches
    found = first_matches(patterns, names)
    assert {n: k for n, k in found.items() if n not in by_chance} == {
        n: k for n, k in expected.items() if n not in by_chance
    }
    assert all(found.get(name, name) == get_pattern_key(patterns, name) for name in by_chance)


def test_one_pattern_a_module_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As other tools write configs: PEFT's own rule, pattern by pattern, would be quadratic."""

    def refuse(*_: object) -> str:
        raise AssertionError("a plain name was matched as a regex")

    monkeypatch.setattr(lora_config, "get_pattern_key", refuse)
    modules = [rs.TargetModule(name=f"h.{i}.fc", in_features=64, out_features=64) for i in range(600)]
    ranks = {module.name: 1 + i % 7 for i, module in enumerate(modules)}
    config = LoraConfig(target_modules=list(ranks), r=3, rank_pattern=ranks)
    assert from_lora_config(config, modules) == ranks


def test_a_deep_model_takes_few_letters() -> None:
    layers = [f"model.layers.{i}.{m}" for i in range(300) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1")]
    assert len(names_regex(layers)) < 5 * 300
