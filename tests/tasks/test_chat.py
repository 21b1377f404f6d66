"""The chat task: answers only in the loss, whatever the template and the form of the rows, and rows that cannot be used."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import rankscope as rs
from rankscope.tasks import Chat, evaluate, fingerprint_task, profile_task
from rankscope.training import save_adapter
from tests.refusals import refused
from tests.tasks.answer_metrics import check_answer_metrics
from tests.tasks.models import save_llama
from tests.tasks.vision_models import TEXT, tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3's: an empty thought stands before the last answer only.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def save_chat_model(folder: Path, template: str | None = CHATML) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(folder)
    tokens = tokenizer()
    tokens.chat_template = template
    tokens.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str | None], Path]:
    return lambda template=CHATML: save_chat_model(tmp_path / "model", template)


def messages(*turns: str, system: str = "") -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *said] if system else said


def chats(n: int = 8) -> pd.DataFrame:
    """`n` conversations a split; the answer is the question's number."""
    rows = [messages(f"say {i}", str(i % 5), "and again?", "no" * (1 + i % 3), system="be short") for i in range(3 * n)]
    return pd.DataFrame({"messages": rows, "split": ["train"] * n + ["validation"] * n + ["test"] * n})


def splits(*rows: dict[str, Any]) -> pd.DataFrame:
    """These rows to train, and one more each to validate and to test."""
    more = [{"messages": messages(f"say {i}", "no")} for i in range(2)]
    if "prompt" in rows[0]:
        more = [{"prompt": f"say {i}", "completion": "no"} for i in range(2)]
    return pd.DataFrame([*rows, *more]).assign(split=["train"] * len(rows) + ["validation", "test"])


def learned(task: Chat, index: int = 0) -> str:
    labels = task._inputs(task._examples["train"][index])["labels"]
    return task._tokenizer.decode(labels[labels != -100])


def test_from_the_profile_to_plain_peft(model, tmp_path: Path) -> None:
    chats().to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    spec = {"type": "chat", "model": "model", "data": "rows.jsonl", "batch_size": 4, "dtype": "bfloat16"}
    model()
    task = rs.load_task(spec, base_dir=tmp_path)
    targets = rs.find_targets(task.build_model())
    taken = profile_task(task, n_batches=2)
    budget = rs.ParameterBudget.uniform(targets, 1)
    allocation = rs.allocate("one-shot", targets=targets, budget=budget, profile=taken)
    trained, result = rs.train(task, allocation, steps=1, learning_rate=0.05)
    assert set(result.metrics) == {"token_accuracy", "exact_match", "loss"}
    assert dict(result.metrics) != evaluate(task, task.build_model())
    save_adapter(trained, task, tmp_path / "adapter")
    options = json.loads((tmp_path / "adapter" / "model_kwargs.json").read_text())
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    assert evaluate(task, again) == dict(result.metrics)
    assert "AutoPeftModelForCausalLM.from_pretrained(folder" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_model_learns_the_answers(model) -> None:
    task = Chat(model(), chats(), batch_size=8)
    network = task.build_model().train()
    before = task.evaluate(network, "train")
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(40):
        for batch in task.train_batches(step):
            task.loss(network, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = task.evaluate(network, "train")
    assert after["loss"] < before["loss"] / 3
    assert after["token_accuracy"] > 0.7


def test_loss_is_the_models_own_and_metrics_those_of_single_rows(model) -> None:
    task = Chat(model(), chats(), batch_size=4)
    check_answer_metrics(task)


def test_a_model_whose_head_takes_all_places(model, tmp_path: Path) -> None:
    task = Chat(model(), chats())
    network = GPT2LMHeadModel(GPT2Config(vocab_size=TEXT["vocab_size"], n_embd=16, n_layer=1, n_head=2)).eval()
    batch = next(iter(task.train_batches(0)))
    forward = network.forward
    network.forward = lambda input_ids, attention_mask: forward(input_ids, attention_mask=attention_mask)
    logits = forward(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(task.loss(network, batch), expected)


# --- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "red<|im_end|>warm<|im_end|>"),
        (LLAMA2, " red</s> warm</s>"),
        (THINKING, "red<|im_end|><think></think>warm<|im_end|>"),
        (BARE, " red warm</s>"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "parts", "sharegpt"])
def test_only_answers_and_the_tokens_that_end_them_are_learned(model, template: str, expected: str, form: str) -> None:
    row: dict[str, Any] = {"messages": messages("which colour?", "red", "and the hue?", "warm", "not learned")}
    if form == "parts":
        row["messages"] = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]
    elif form == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        row["messages"] = [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]
    task = Chat(model(template), splits(row))
    assert learned(task) == expected
    batch = task.collate([task._inputs(row) for row in task._examples["train"] + task._examples["test"]])
    assert (batch["labels"][batch["labels"] != -100] == batch["input_ids"][batch["labels"] != -100]).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_prompts_and_completions(model) -> None:
    folder = model()
    few_shot = messages("which colour?", "red", "and the hue?")
    rows = [{"prompt": "hello", "completion": "hi"}, {"prompt": few_shot, "completion": messages("", "warm")[1:]}]
    task = Chat(folder, splits(*rows))
    assert [learned(task, index) for index in range(2)] == ["hi<|im_end|>", "warm<|im_end|>"]
    assert task._tokenizer.decode(task._inputs(task._examples["train"][0])["input_ids"][0]).startswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi"
    )
    alpaca = splits(rows[0]).rename(columns={"prompt": "instruction", "completion": "output"})
    named = Chat(folder, alpaca, columns={"prompt": "instruction", "completion": "output"})
    assert learned(named) == "hi<|im_end|>"


def test_a_template_of_ones_own(model, tmp_path: Path) -> None:
    model(None)
    chats().to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    (tmp_path / "own.jinja").write_text(CHATML)
    spec = {"type": "chat", "model": "model", "data": "rows.jsonl"}
    refused(
        f"`{tmp_path}/model` must have a tokenizer with a chat template, but has none; set `chat_template` to a "
        "file with one, or take `type: causal-lm` for plain texts.",
        rs.load_task(spec, base_dir=tmp_path).build_model,
    )
    task = rs.load_task({**spec, "chat_template": "own.jinja"}, base_dir=tmp_path)
    assert learned(task).endswith("<|im_end|>")
    other = fingerprint_task(rs.load_task(spec, base_dir=tmp_path), task.build_model())
    assert fingerprint_task(task)["data"] != other["data"]


# --- packing ---------------------------------------------------------------------------------------------------


def token_losses(task: Chat, network: Any, batch: dict[str, Any]) -> list[float]:
    """The loss of each answer token."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = network(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none").tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_tokens_have_the_loss_that_they_have_alone(tmp_path: Path, attention: str, kind: str) -> None:
    folder = save_chat_model(tmp_path / "model")
    if kind == "gpt2":
        GPT2LMHeadModel(GPT2Config(vocab_size=TEXT["vocab_size"], n_embd=32, n_layer=2, n_head=2)).save_pretrained(
            folder
        )
    options = {"attn_implementation": attention}
    packed = Chat(folder, chats(24), packing=True, max_length=300, batch_size=2, model_options=options)
    network = packed.build_model().eval()
    alone = {tuple(row["input_ids"][0].tolist()): row for row in map(packed._inputs, packed._examples["train"])}
    with torch.no_grad():
        expected = [loss for row in alone.values() for loss in token_losses(packed, network, row)]
        batches = list(packed.train_batches(0))
        found = [loss for batch in batches for loss in token_losses(packed, network, batch)]
    assert sorted(found) == pytest.approx(sorted(expected), abs=1e-4)
    assert all(batch["input_ids"].shape[1] <= 300 for batch in batches)
    n_tokens = sum(len(ids) for ids in alone)
    assert sum(len(batch["input_ids"]) for batch in batches) <= -(-n_tokens // 240)  # sequences are four fifths full
    assert max(int((batch["position_ids"] == 0).sum(1).max()) for batch in batches) > 1
    batch = batches[0]
    loss = torch.tensor(token_losses(packed, network, batch)).mean()
    torch.testing.assert_close(packed.loss(network, batch), loss)


def test_packing_trains_profiles_and_evaluates_single_conversations(model) -> None:
    folder = model()
    plain, packed = (
        Chat(folder, chats(24), packing=packing, max_length=300, batch_size=2) for packing in (False, True)
    )
    assert evaluate(packed, packed.build_model()) == evaluate(plain, plain.build_model())
    targets = rs.find_targets(packed.build_model())
    budget = rs.ParameterBudget.uniform(targets, 1)
    allocation = rs.allocate("one-shot", targets=targets, budget=budget, profile=profile_task(packed))
    _, result = rs.train(packed, allocation, steps=4, learning_rate=0.01, seed=1)
    assert dict(result.metrics) != evaluate(packed, packed.build_model())
    orders = [[batch["input_ids"].tolist() for batch in packed.train_batches(seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert fingerprint_task(packed)["task"] != fingerprint_task(plain)["task"]


def test_flash_attention_gets_one_sequence(model) -> None:
    options = {"attn_implementation": "flash_attention_2"}
    task = Chat(model(), chats(24), packing=True, max_length=300, batch_size=2, model_options=options)
    assert all(len(batch["input_ids"]) == 1 for batch in task.train_batches(0))


@pytest.mark.parametrize("kind", ["Mamba", "Bloom", "Lfm2"])
def test_a_model_that_mixes_packed_conversations_is_refused(model, kind: str) -> None:
    """By a state, biases of distance, or convolutions."""
    folder = model()
    options: dict[str, Any] = {"vocab_size": TEXT["vocab_size"], "hidden_size": 16, "num_hidden_layers": 2}
    if kind == "Lfm2":
        options |= {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        options["layer_types"] = ["conv", "full_attention"]
    elif kind == "Bloom":
        options = {"vocab_size": TEXT["vocab_size"], "hidden_size": 16, "n_layer": 2, "n_head": 2}
    config = getattr(transformers, f"{kind}Config")(**options)
    network = getattr(transformers, f"{kind}ForCausalLM")(config)
    network.save_pretrained(folder)
    attention = getattr(network.config, "_attn_implementation", None)
    refused(
        "`packing` needs a model that keeps the conversations of a sequence apart by their positions, but "
        f"{kind}ForCausalLM with {attention} attention does not; leave it out.",
        Chat(folder, chats(), packing=True).build_model,
    )
    Chat(folder, chats()).build_model()


# --- rows that cannot be used ----------------------------------------------------------------------------------


def test_answers_are_cut_and_questions_are_not(model, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": messages("hi", "a" * 40)}] + [{"messages": messages("hi", f"{i}")} for i in range(8)]
    rows.append({"messages": messages("h" * 90, "a")})
    task = Chat(model(), splits(*rows), max_length=30, batch_size=4, max_skipped=0.1)
    assert task._inputs(task._examples["train"][0])["input_ids"].shape == (1, 30)
    with caplog.at_level(logging.WARNING):
        assert sum(len(batch["labels"]) for batch in task.train_batches(0)) == 9
    assert caplog.messages == [
        "skipped 1 of 10 rows in 'train', as row 10 (its question takes 109 tokens, and `max_length` leaves 30)"
    ]
    refused(
        "at most 0.05 of the rows may be skipped (`max_skipped`), but 1 of 10 in 'train' already, as row 10 (its question takes "
        "109 tokens, and `max_length` leaves 30); repair or drop them.",
        lambda: list(Chat(model(), splits(*rows), max_length=30).train_batches(0)),
    )


def test_a_template_that_refuses_drops_or_changes(model) -> None:
    twice = [{"role": "user", "content": "a"}, *messages("hi", "you")]
    refused(
        "at most 0.05 of the rows may be skipped (`max_skipped`), but 1 of 1 in 'train' already, as row 1 (the chat template "
        "refuses it: roles must alternate); repair or drop them.",
        lambda: list(Chat(model(LLAMA2), splits({"messages": twice})).train_batches(0)),
    )
    dropping = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}"
    for template in (dropping, CHATML.replace("| trim", "| upper")):
        refused(
            "the chat template must write each answer as it is, but that of TokenizersBackend drops or changes one in row 1; "
            "correct it.",
            lambda template=template: list(
                Chat(model(template), splits({"messages": messages("hi", "you")})).train_batches(0)
            ),
        )
    refused(
        "the chat template must begin an answer as it prompts for one, but that of TokenizersBackend does not in row 1; correct it.",
        lambda: list(
            Chat(model(CHATML.replace("assistant\n", "bot\n")), splits({"messages": messages("a", "b")})).train_batches(
                0
            )
        ),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": messages("hi")}, "each row must hold a turn of the assistant, and one before it, but 1 of 3 do not, as row 1; drop them."),
        ({"messages": []}, "each row must hold a turn of the assistant, and one before it, but 1 of 3 do not, as row 1; drop them."),
        ({"messages": messages("", "hi")[1:]}, "each row must hold a turn of the assistant, and one before it, but 1 of 3 do not, as row 1; "
         "drop them."),
        ({"messages": messages("hi", " ")}, "each turn must hold a text, but row 1 has one of the assistant without; correct or "
         "drop it."),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
         "each turn must hold a text, but row 1 has one of the user without; correct or drop it."),
        ({"messages": "hi"}, "messages must be a list, but row 1 holds 'hi'; convert it."),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages must have a role among human, gpt, system, user, assistant, "
         "but row 1 holds {'role': 'bot', 'content': 'x'}; correct it."),
        ({"prompt": "hi", "completion": None}, "messages must be a list, but row 1 holds nan; convert it."),
        ({"prompt": "hi", "completion": ""}, "each turn must hold a text, but row 1 has one of the assistant without; correct or "
         "drop it."),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    refused(message, lambda: Chat("anything", splits(row)))


def test_columns_that_are_wrong() -> None:
    refused(
        "the data must have a column 'messages', or 'prompt' and 'completion', but has text, split; rename them, or set `columns`.",
        lambda: Chat("anything", chats().rename(columns={"messages": "text"})),
    )
    refused(
        "the data must have a column 'messages', or 'prompt' and 'completion', but has conversations, split; set `columns: "
        "{messages: conversations}`.",
        lambda: Chat("anything", chats().rename(columns={"messages": "conversations"})),
    )
    refused(
        "the DataFrame must have a column 'completion', but has none; did you mean 'completions'?",
        lambda: Chat("x", pd.DataFrame({"prompt": ["a"], "completions": ["b"]})),
    )
    refused(
        "`columns` takes no key `promt`; did you mean 'prompt'?", lambda: Chat("x", chats(), columns={"promt": "a"})
    )


def test_a_dry_run_needs_no_data(tmp_path: Path) -> None:
    from rankscope.tasks import outline_task

    save_llama(tmp_path / "model")
    outline = outline_task(
        {"type": "chat", "model": "model", "data": "gone.jsonl", "dtype": "bfloat16"}, base_dir=tmp_path
    )
    assert (outline.batch_size, outline.max_length, outline.model.dtype) == (8, 1024, torch.bfloat16)
