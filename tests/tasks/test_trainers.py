"""A user's own Trainer as a task: profile, training, search, comparison and controller, and functions that cannot work."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joblib.externals.loky.backend.reduction import dumps, loads
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel

import rankscope as rs
from rankscope.errors import SettingsError, TaskError, TrainingError
from rankscope.tasks import TrainerTask, evaluate, fingerprint_task, profile_task
from rankscope.training import AdaLora, FullFineTuning, HeadOnly, PeftAdapter, save_adapter
from tests.architectures import build
from tests.cli.terminal import invoke_code
from tests.refusals import refused
from tests.tasks.models import save_bert, sentences

SOURCE = '''
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

FOLDER = Path("{folder}")


class Own(Trainer):
    """With a loss of its own: twice the usual one."""

    seen = []

    def training_step(self, *args, **kwargs):
        Own.seen.append(type(self.optimizer.optimizer).__name__)
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


def accuracy(predictions):
    return {{"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}}


def make_trainer(peft_config, seed, **options):
    set_seed(0)  # the head
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER / "bert", num_labels=3)
    if peft_config is not None:
        set_seed(seed)
        model = get_peft_model(model, peft_config)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "bert")
    rows = pd.read_parquet(FOLDER / "rows.parquet")
    rows["labels"] = rows["label"].map({{"bird": 0, "cat": 1, "dog": 2}})
    tokens = tokenizer(rows["text"].tolist())["input_ids"]
    data = Dataset.from_dict({{"input_ids": tokens, "labels": rows["labels"].tolist()}}).shuffle(seed=0)
    args = TrainingArguments(
        FOLDER / "out", per_device_train_batch_size=4, optim="sgd", metric_for_best_model="accuracy", use_cpu=True, report_to=[],
        **options,
    )
    return Own(
        model, args, DataCollatorWithPadding(tokenizer), data.select(range(15)),
        {{"validation": data.select(range(15, 21)), "test": data.select(range(21, 27))}},
        tokenizer, compute_metrics=accuracy,
    )


def without(peft_config, seed):
    return make_trainer(None, seed)


def ignores(peft_config, seed):
    from peft import LoraConfig
    return make_trainer(LoraConfig(r=3, target_modules=["query"]) if peft_config else None, seed)


def always(peft_config, seed):
    from peft import LoraConfig
    return make_trainer(LoraConfig(r=3, target_modules=["query"]), seed)


def nothing(peft_config, seed):
    make_trainer(peft_config, seed)


def raises(peft_config, seed):
    raise RuntimeError("no luck")


def one_set(peft_config, seed):
    trainer = make_trainer(peft_config, seed)
    trainer.eval_dataset = trainer.eval_dataset["validation"]
    trainer.args.metric_for_best_model = None
    return trainer


def no_set(peft_config, seed):
    trainer = make_trainer(peft_config, seed)
    trainer.eval_dataset = None
    return trainer
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    sentences().to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "train.py").write_text(SOURCE.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def load(folder: Path) -> Callable[[str], Any]:
    return lambda name="make_trainer": rs.load_task(f"train.py:{name}", base_dir=folder)


def uniform(task: Any, rank: int = 1) -> rs.RankAllocation:
    targets = rs.find_targets(task.build_model())
    return rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, rank))


def test_from_the_profile_to_plain_peft(load, folder: Path) -> None:
    task = load()
    assert isinstance(task, TrainerTask)
    assert (task.name, task.metric, task.task_type) == ("train.py:make_trainer", "accuracy", "SEQ_CLS")
    assert task.head_modules == ("classifier",)
    model = task.build_model()
    batch = next(iter(task.train_batches(0)))
    torch.testing.assert_close(task.loss(model, batch), 2 * model(**batch).loss)
    targets = rs.find_targets(model)
    taken = profile_task(task, n_batches=2, head_steps=1)
    budget = rs.ParameterBudget.uniform(targets, 1)
    allocation = rs.allocate("one-shot", targets=targets, budget=budget, profile=taken)
    steps = []
    trained, result = rs.train(task, allocation, steps=3, learning_rate=0.5, evaluate_every=2, on_step=steps.append)
    assert steps == [1, 2, 3]
    assert list(result.history) == [2, 3]
    assert set(result.metrics) == {"accuracy", "loss"}
    assert result.parameters == allocation.parameters
    assert result.allocation == allocation
    assert not list(folder.glob("out/checkpoint*"))
    save_adapter(trained, task, folder / "adapter")
    options = json.loads((folder / "adapter" / "model_kwargs.json").read_text())
    options["id2label"] = {int(code): label for code, label in options["id2label"].items()}
    again = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", **options)
    assert evaluate(task, again) == pytest.approx(dict(result.metrics))
    assert evaluate(task, again, "test")["loss"] != result.metrics["loss"]


def test_the_users_training_is_what_runs(load) -> None:
    task = load()
    model, result = rs.train(task, FullFineTuning(), steps=2, learning_rate=0.1)
    assert task._factory.__globals__["Own"].seen == ["SGD"] * 2
    assert result.parameters == sum(p.numel() for name, p in model.named_parameters() if "classifier" not in name)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, task.build_model().get_parameter(n))]
    assert len(changed) > 20


def test_runs_repeat_and_leave_generators_alone(load) -> None:
    task, states = load(), []
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    before = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    found = []
    for seed in (5, 5, 6):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
        found.append(dict(rs.train(task, uniform(task), steps=3, learning_rate=0.5, seed=seed)[1].metrics))
        states.append((random.random(), np.random.rand(), torch.rand(())))  # noqa: NPY002
    assert states == [before] * 3
    assert found[0] == found[1] != found[2]
    orders = [[batch["input_ids"].tolist() for batch in task.train_batches(seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert len(orders[0]) == 4


def test_an_evaluation_changes_no_model(load) -> None:
    task = load()
    model = task.build_model().train()
    attributes = set(vars(model))
    first = evaluate(task, model)
    assert evaluate(task, model) == first
    assert (set(vars(model)), model.training) == (attributes, True)
    assert not task.bare.accelerator._models


def test_a_controller_moves_ranks(load) -> None:
    task = load()
    allocation = uniform(task)
    some = rs.RankAllocation(allocation.targets, tuple(2 * (i % 2) for i in range(len(allocation.targets))))
    settings = rs.ControllerSettings(
        mode="on", every=2, freeze_fraction=1.0, samples=2, hysteresis=0.0, min_gain_ratio=0.0
    )
    model, result = rs.train(task, some, steps=8, learning_rate=0.5, controller=settings)
    assert len(result.decisions) > 0
    assert result.allocation.parameters <= some.parameters
    assert dict(rs.RankAllocation.from_peft_model(model, some.targets).ranks) == dict(result.allocation.ranks)


def test_other_methods(load) -> None:
    task = load()
    _, head = rs.train(task, HeadOnly(), steps=2, learning_rate=0.5)
    assert head.allocation is None
    config = LoraConfig(r=2, target_modules=["query"], use_dora=True)
    _, result = rs.train(task, PeftAdapter(config, "DoRA"), steps=2, learning_rate=0.5)
    assert result.parameters == 2 * (2 * 32 + 16)
    assert config.modules_to_save is None
    refused(
        "AdaLoRA must run in rankscope's own loop, but `train.py:make_trainer` brings a Trainer; leave it out.",
        lambda: rs.train(task, AdaLora(uniform(task).targets, 1, 8.0), steps=10),
        TrainingError,
    )


def test_a_search(load) -> None:
    task = load()
    targets = rs.find_targets(task.build_model())
    budget = rs.ParameterBudget.uniform(targets, 1)
    taken = profile_task(task, n_batches=2, head_steps=1)
    found = rs.search(task, budget=budget, profile=taken, n_trials=3, training={"steps": 2, "learning_rate": 0.5})
    assert len(found.study.trials) >= 2


def test_a_study_of_the_command_line(folder: Path) -> None:
    study = folder / "mine.yaml"
    study.write_text(
        "task: train.py:make_trainer\nbudget: {uniform_rank: 1}\ntraining: {steps: 2, learning_rate: 0.5}\n"
        "profile: {n_batches: 2, head_steps: 1}\n"
    )
    for command in ("profile", "allocate", "train"):
        status, output, errors = invoke_code(command, study, "--out", folder / "mine")
        assert (status, errors.count("Traceback")) == (0, 0), output + errors
    adapter = folder / "mine" / "adapter"
    assert "AutoPeftModelForSequenceClassification" in (adapter / "README.md").read_text()
    status, _, errors = invoke_code("train", study, "--dry-run")
    assert (status, errors.count("\n")) == (2, 1)


def test_it_goes_to_workers(load) -> None:
    task = load()
    again = loads(dumps(task))
    assert "bare" not in vars(again)
    assert evaluate(again, again.build_model()) == evaluate(task, task.build_model())


@pytest.mark.slow
def test_a_comparison(load) -> None:
    task = load()
    targets = rs.find_targets(task.build_model())
    budget = rs.ParameterBudget.uniform(targets, 1)
    taken = profile_task(task, n_batches=2, head_steps=1)
    compared = rs.compare(
        task, methods=["uniform", "one-shot"], budget=budget, seeds=range(2), training={"steps": 2, "learning_rate": 0.5},
        n_tuning_seeds=1, profile=taken,
    )  # fmt: skip
    assert set(compared.runs["method"]) == {"uniform", "one-shot"}


def test_the_fingerprint_follows_the_file_and_the_data(load, folder: Path) -> None:
    first = fingerprint_task(load())
    assert fingerprint_task(load()) == first
    (folder / "train.py").write_text((folder / "train.py").read_text() + "\n# changed\n")
    assert fingerprint_task(load())["data"] != first["data"]
    (folder / "train.py").write_text(SOURCE.format(folder=folder))
    assert fingerprint_task(load()) == first
    sentences()[::-1].to_parquet(folder / "rows.parquet")
    assert fingerprint_task(load())["data"] != first["data"]


def test_functions_that_cannot_work(load, folder: Path) -> None:
    task = load("ignores")
    asked = uniform(task)
    refused(
        f"`train.py:ignores` must build the ranks of its `peft_config` ({asked.parameters:,} adapter parameters), but built others "
        "(192); pass it to get_peft_model, or to TRL's Trainer.",
        lambda: rs.train(task, asked, steps=1),
        TaskError,
    )
    refused(
        f"`train.py:without` must build the ranks of its `peft_config` ({asked.parameters:,} adapter parameters), but built no "
        "adapter; pass it to get_peft_model, or to TRL's Trainer.",
        lambda: rs.train(load("without"), asked, steps=1),
        TaskError,
    )
    refused(
        "`train.py:always` must give the model without adapters where `peft_config` is None, but it has some; call get_peft_model "
        "only with a config.",
        lambda: load("always"),
        TaskError,
    )
    refused(
        "`train.py:nothing` must return a transformers Trainer, but returned NoneType; end it with `return trainer`.",
        lambda: load("nothing"),
        TaskError,
    )
    line = SOURCE[: SOURCE.index("no luck")].count("\n") + 1
    refused(
        f"`train.py:raises` must make a Trainer, but raised RuntimeError: no luck (train.py, line {line}); --debug shows the "
        "traceback.",
        lambda: load("raises"),
        TaskError,
    )


@pytest.mark.parametrize("way", ["search", "compare", "budget"])
def test_ignored_ranks_end_every_command(load, way: str) -> None:
    """A profile needs none: it is taken of the bare model."""
    task = load("ignores")
    targets = rs.find_targets(task.build_model())
    given: dict[str, Any] = {"profile": profile_task(task, n_batches=2, head_steps=1)}
    given["training"] = {"steps": 2, "learning_rate": 0.5}
    budget = rs.ParameterBudget.uniform(targets, 1)
    with pytest.raises(TaskError, match="`train.py:ignores` must build the ranks of its `peft_config`"):
        if way == "search":
            rs.search(task, budget=budget, n_trials=3, **given)
        elif way == "compare":
            rs.compare(
                task, methods=["uniform"], budget=budget, targets=targets, seeds=range(2), n_tuning_seeds=1, **given
            )
        else:
            rs.plan_budget(task, targets=targets, settings={"ceiling": False, "n_seeds": 2, "max_seeds": 2}, **given)


def test_sets_to_evaluate_on(load) -> None:
    task = load("one_set")
    model = task.build_model()
    assert task.metric == "negative_loss"
    metrics = evaluate(task, model)
    assert metrics["negative_loss"] == -metrics["loss"]
    refused(
        "`train.py:one_set` must give a test set to compare on, but gives one `eval_dataset`; pass {'validation': ..., "
        "'test': ...}.",
        lambda: evaluate(task, model, "test"),
        TaskError,
    )
    refused(
        "`train.py:no_set` must give a Trainer with an `eval_dataset`, but it has none; pass one.",
        lambda: evaluate(load("no_set"), model),
        TaskError,
    )


def test_what_the_trainers_arguments_say_is_no_setting(load) -> None:
    task = load()
    refused(
        "`training.weight_decay` is for rankscope's own loop, but got 0.1; leave it out, and set it in the arguments of "
        "`train.py:make_trainer`.",
        lambda: rs.train(task, uniform(task), steps=1, weight_decay=0.1),
        SettingsError,
    )


TRL = """
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from transformers import AutoModelForCausalLM
from tests.control.test_trl import WORDS, tokenizer

OPTIONS = dict(per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False, max_length=32)


def sft(peft_config, seed):
    texts = [f"the {a} cat {b} the {c} dog" for a in WORDS[8:11] for b in WORDS[5:8] for c in WORDS[8:11]]
    data = Dataset.from_dict({"text": texts}).shuffle(seed=0)
    args = SFTConfig("FOLDER/out", **OPTIONS)
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained("FOLDER/llama"), args, train_dataset=data.select(range(18)), eval_dataset=data.select(range(18, 27)),
        processing_class=tokenizer(), peft_config=peft_config,
    )


def dpo(peft_config, seed):
    rows = [{"prompt": f"the {a} cat", "chosen": f" {b} the dog", "rejected": f" {c} a bird"}
            for a in WORDS[8:11] for b in WORDS[5:8] for c in WORDS[8:11]]
    data = Dataset.from_list(rows).shuffle(seed=0)
    args = DPOConfig("FOLDER/out", metric_for_best_model="rewards/accuracies", **OPTIONS)
    return DPOTrainer(
        AutoModelForCausalLM.from_pretrained("FOLDER/llama"), args=args, train_dataset=data.select(range(18)), eval_dataset=data.select(range(18, 27)),
        processing_class=tokenizer(), peft_config=peft_config,
    )


def other(peft_config):
    return LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM") if peft_config else None


def sft_ignoring(peft_config, seed):
    return sft(other(peft_config), seed)


def dpo_ignoring(peft_config, seed):
    return dpo(other(peft_config), seed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trls_trainers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    torch.manual_seed(0)
    build("llama").save_pretrained(tmp_path / "llama")
    (tmp_path / "train.py").write_text(TRL.replace("FOLDER", str(tmp_path)))
    task = rs.load_task(f"train.py:{kind}", base_dir=tmp_path)
    assert task.metric == {"sft": "negative_loss", "dpo": "rewards/accuracies"}[kind]
    assert task.task_type == "CAUSAL_LM"
    targets = rs.find_targets(task.build_model())
    taken = profile_task(task, n_batches=2)
    budget = rs.ParameterBudget.uniform(targets, 1)
    allocation = rs.allocate("one-shot", targets=targets, budget=budget, profile=taken)
    before = evaluate(task, task.build_model())
    model, result = rs.train(task, allocation, steps=4, learning_rate=0.02, evaluate_every=2)
    assert result.metrics["loss"] < before["loss"]
    assert evaluate(task, model) == pytest.approx(dict(result.metrics))
    save_adapter(model, task, tmp_path / "adapter")
    again = PeftModel.from_pretrained(task.build_model(), tmp_path / "adapter")
    assert evaluate(task, again)["loss"] == pytest.approx(result.metrics["loss"], rel=1e-4)
    ignoring = rs.load_task(f"train.py:{kind}_ignoring", base_dir=tmp_path)
    refused(
        f"`train.py:{kind}_ignoring` must build the ranks of its `peft_config` ({allocation.parameters:,} adapter parameters), but "
        "built others (128); pass it to get_peft_model, or to TRL's Trainer.",
        lambda: rs.train(ignoring, allocation, steps=1),
        TaskError,
    )
