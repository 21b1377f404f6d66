"""The callback in a real Trainer on the digits task: ranks move, resuming and the best model get theirs, plain PEFT loads it."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import rankscope as rs
from rankscope.control.trainer import STATE_FILE
from rankscope.errors import ModelError, SettingsError
from rankscope.lora import count_adapter_parameters, masks_on
from rankscope.tasks import Task
from tests.control.trainers import MASKED, Rows, build, controller_of, ends_the_same, trainer, weights

RESIZED: dict[str, Any] = {}


def loaded(task: Task, folder: Path) -> PeftModel:
    """In plain PEFT."""
    return PeftModel.from_pretrained(task.build_model(), str(folder)).eval()


def logits(model: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(pixel_values=Rows(task).images[:16]).logits
    return found


@pytest.mark.parametrize(("rank", "settings"), [(1, RESIZED), (3, MASKED)], ids=["resized", "masked"])
def test_ranks_move_and_resuming_ends_the_same(
    digits: Task, tmp_path: Path, rank: int, settings: dict[str, Any]
) -> None:
    def fresh(name: str) -> Trainer:
        return trainer(digits, tmp_path / name, model=build(digits, rank), controller=settings)

    whole = fresh("whole")
    whole.train()
    controller = controller_of(whole)
    assert controller.decisions["step"].tolist() == [3, 6, 9]
    assert controller.decisions["action"].tolist()[0] == "moved"
    assert controller.allocation.parameters <= count_adapter_parameters(build(digits))
    logged = [entry for entry in whole.state.log_history if "ranks/moved" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9]
    assert logged[0]["ranks/moved"] > 0

    for step in (5, 10):
        resumed = fresh(f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        ends_the_same(resumed, whole)

    whole.save_model(str(tmp_path / "adapter"))
    plain = loaded(digits, tmp_path / "adapter")
    ranks = {name: rank for name, rank in controller.allocation.ranks.items() if rank}
    assert dict(rs.RankAllocation.from_peft_model(plain).ranks) == ranks
    torch.testing.assert_close(logits(plain, digits), logits(whole.model, digits), rtol=0, atol=1e-6 if settings else 0)


WITHOUT = """
import sys
sys.modules["rankscope"] = None  # an import fails, as where it is not installed
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification
for folder, base, images, outputs in zip(*[iter(sys.argv[1:])] * 4):
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.load(images)).logits, torch.load(outputs), rtol=0, atol=1e-5)
print("same")
"""


def test_loads_where_rankscope_is_not_installed(digits: Task, tmp_path: Path) -> None:
    """In an isolated process that cannot import it, from what the Trainer's own checkpoints and `save_model` wrote."""
    arguments = []
    digits.build_model().save_pretrained(str(tmp_path / "base"))
    torch.save(Rows(digits).images[:16], tmp_path / "images.pt")
    for rank, settings in ((1, RESIZED), (3, MASKED)):
        run = trainer(digits, tmp_path / str(rank), model=build(digits, rank), controller=settings, save_steps=12)
        run.train()
        assert "moved" in set(controller_of(run).decisions["action"])
        run.save_model(str(tmp_path / str(rank) / "adapter"))
        torch.save(logits(run.model, digits), tmp_path / str(rank) / "outputs.pt")
        for folder in ("adapter", "checkpoint-12"):
            files = (Path(str(rank), folder), "base", "images.pt", Path(str(rank), "outputs.pt"))
            arguments += [str(tmp_path / file) for file in files]
    command = [sys.executable, "-I", "-c", WITHOUT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


@pytest.mark.parametrize(("rank", "settings"), [(1, RESIZED), (3, MASKED)], ids=["resized", "masked"])
def test_the_best_model_comes_back_with_its_ranks(
    digits: Task, tmp_path: Path, rank: int, settings: dict[str, Any]
) -> None:
    """The rate is far too high, so that the best checkpoint is an early one, before later moves."""
    run = trainer(
        digits,
        tmp_path,
        model=build(digits, rank),
        controller=settings,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    run.train()
    best = loaded(digits, Path(run.state.best_model_checkpoint))
    targets = rs.find_targets(digits.build_model())
    assert controller_of(run).allocation.vector == rs.RankAllocation.from_peft_model(best, targets).vector
    torch.testing.assert_close(
        logits(run.model, digits), logits(best, digits), rtol=0, atol=1e-3 if settings else 0
    )  # logits of some 20


class Anew(Trainer):
    """Its model comes from `model_init`: once when it is made, and again when it trains."""

    def __init__(self, model: PeftModel, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(args=args, model_init=lambda: build(rs.load_task("digits-shift")), **kwargs)


def test_a_model_that_the_trainer_makes_anew(digits: Task, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "save_steps": 4, "eval_steps": 4, "load_best_model_at_end": True}
    whole = trainer(digits, tmp_path / "whole", kind=Anew, bind=True, **options)
    whole.train()
    assert Path(whole.state.best_model_checkpoint).name == "checkpoint-12"
    best = loaded(digits, tmp_path / "whole" / "checkpoint-12")
    assert torch.equal(logits(best, digits), logits(whole.model, digits))
    resumed = trainer(digits, tmp_path / "resumed", kind=Anew, bind=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    ends_the_same(resumed, whole)


def test_a_named_adapter_of_several_is_resumed(digits: Task, tmp_path: Path) -> None:
    """PEFT keeps its weights in a folder of their own."""

    def fresh(name: str) -> Trainer:
        model = build(digits)
        model.add_adapter("second", model.peft_config["default"])
        model.add_adapter("third", LoraConfig(target_modules=["q_proj"], r=2))
        model.set_adapter("second")
        return trainer(digits, tmp_path / name, model=model, controller={"adapter_name": "second"})

    whole = fresh("whole")
    whole.train()
    resumed = fresh("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    ends_the_same(resumed, whole)
    assert set(controller_of(whole).decisions["action"]) >= {"moved"}


def test_sketches_of_a_resumed_run_have_the_size_of_the_first(digits: Task, tmp_path: Path) -> None:
    """It follows from the ranks to begin with, which a resumed run does not see."""

    def fresh(name: str) -> Trainer:
        settings = {"budget": rs.ParameterBudget.uniform(rs.find_targets(digits.build_model()), 9)}
        return trainer(digits, tmp_path / name, model=build(digits, 9), controller=settings, save_steps=4)

    whole = fresh("whole")
    whole.train()
    resumed = fresh("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    ends_the_same(resumed, whole)


class Recorder(TrainerCallback):
    """What a logger is given."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))


def test_accumulation_and_scalars_through_the_trainer(digits: Task, tmp_path: Path) -> None:
    """A decision and the Trainer's own logging fall on the same step; a callback that reports sees both, each once."""
    seen = Recorder()
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "no", "logging_steps": 3}
    run = trainer(digits, tmp_path, callbacks=(seen,), bind=True, **options)
    run.callback_handler.callbacks.insert(0, run.callback_handler.pop_callback(seen))  # where TensorBoard's is
    run.train()
    controller = controller_of(run)
    assert controller.decisions["batches"].tolist() == [4]
    (entry,) = [entry for entry in run.state.log_history if "ranks/moved" in entry]
    assert entry["step"] == 3
    assert entry["ranks/parameters"] == controller.allocation.parameters
    assert entry["epoch"] > 0
    assert [(step, "ranks/moved" in logs, "loss" in logs) for step, logs in seen.logs] == [
        (3, True, False),
        (3, False, True),
        (4, False, False),  # the Trainer's summary at the end
    ]
    assert seen.logs[0][1] == {name: value for name, value in entry.items() if name != "step"}


def test_a_callback_that_joins_late_resumes_too(digits: Task, tmp_path: Path) -> None:
    whole = trainer(digits, tmp_path / "whole", bind=True)
    whole.train()
    other = trainer(digits, tmp_path / "other")
    (callback,) = [each for each in other.callback_handler.callbacks if isinstance(each, rs.RankControllerCallback)]
    resumed = Trainer(build(digits), other.args, train_dataset=other.train_dataset)
    callback.bind(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    ends_the_same(resumed, whole)


def test_bind_joins_the_callbacks_of_the_trainer(digits: Task, tmp_path: Path) -> None:
    run = trainer(digits, tmp_path, max_steps=4, save_strategy="no", bind=True)
    (callback,) = [each for each in run.callback_handler.callbacks if isinstance(each, rs.RankControllerCallback)]
    run.remove_callback(callback)
    callback.bind(run)
    assert callback in run.callback_handler.callbacks
    with pytest.raises(SettingsError, match="`trainer` must be a transformers Trainer, but got a NoneType."):
        callback.bind(None)


def test_tensorboard_gets_the_scalars(digits: Task, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trainer(digits, tmp_path, max_steps=4, save_strategy="no", report_to=["tensorboard"], bind=True)
    run.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    (scalar,) = events.EventAccumulator(str(file.parent)).Reload().Scalars("train/ranks/parameters")
    assert (scalar.step, scalar.value) == (3, controller_of(run).allocation.parameters)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"optim": "adafactor"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=["bf16", "adafactor", "checkpointing", "reentrant", "compiled"],
)
def test_the_trainers_other_ways_to_run(digits: Task, tmp_path: Path, options: dict[str, Any]) -> None:
    """Ranks are masked where the model is compiled."""
    compiled = "torch_compile" in options
    torch._dynamo.reset()
    model = build(digits, 3 if compiled else 1)
    if "gradient_checkpointing" in options:
        model.get_base_model().enable_input_require_grads()  # without it, reentrant checkpoints give adapters no gradient
    run = trainer(
        digits,
        tmp_path,
        model=model,
        controller={"start": "uniform"},
        save_strategy="no",
        max_steps=8,
        **options,
    )
    run.train()
    assert (masks_on(run.model) is not None) == compiled
    assert "moved" in set(controller_of(run).decisions["action"])
    assert controller_of(run).decisions["broken"].tolist() == [0, 0]
    assert controller_of(run).decisions["batches"].tolist() == [2, 2]


# --- bad input -----------------------------------------------------------------------------------------------------


def refuses(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def test_models_that_a_trainer_cannot_control(digits: Task, tmp_path: Path) -> None:
    with refuses(
        ModelError,
        "`model` must be a peft.PeftModel, but is a ViTForImageClassification; wrap it with get_peft_model.",
    ):
        trainer(digits, tmp_path, model=digits.build_model())
    several = build(digits)
    several.add_adapter("second", several.peft_config["default"])
    with refuses(
        ModelError, "`adapter_name` must say which of the adapters ['default', 'second'] is meant, but is None."
    ):
        trainer(digits, tmp_path, model=several)
    merged = build(digits)
    merged.merge_adapter()
    run = trainer(digits, tmp_path, model=merged)
    first = "vit.layers.0.attention.q_proj"
    with refuses(ModelError, f"adapters must not be merged, but ['default'] are in `{first}`; unmerge first."):
        run.train()
    assert run.state.global_step == 0


def test_budgets_and_optimizers_that_a_trainer_cannot_control(digits: Task, tmp_path: Path) -> None:
    model = build(digits, 2)
    before = {name: value.clone() for name, value in weights(model).items()}
    message = (
        "`budget` must cover the ranks to begin with (13,824 parameters), but got 6,912; raise it, or pass `start`."
    )
    with refuses(SettingsError, message):
        trainer(digits, tmp_path, model=model).train()
    message = (
        "masked ranks must have room to grow, but every module begins at its capacity, the rank it was wrapped with; wrap the "
        "model at a larger rank, and pass `start`."
    )
    with refuses(ModelError, message):
        trainer(digits, tmp_path, model=build(digits), controller={"rank_change": "mask"}).train()
    run = trainer(digits, tmp_path, model=model, controller={"start": "uniform"})
    run.optimizer = torch.optim.AdamW(p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad)
    n = 2 * len(rs.find_targets(digits.build_model()))
    message = (
        f"`optimizer` must own the adapter's parameters, but lacks {n} of {n}; build it from the PEFT model's parameters, after "
        "wrapping."
    )
    with refuses(ModelError, message):
        run.train()
    assert weights(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert masks_on(model) is None


class NanLoss(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * float("nan")


def test_no_decision_on_gradients_that_are_nan(digits: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(digits)
    options = {"max_steps": 8, "save_strategy": "no", "learning_rate": 0.0}
    run = trainer(digits, tmp_path, model=model, kind=NanLoss, **options)
    with caplog.at_level("WARNING", logger="rankscope"):
        run.train()
    assert controller_of(run).decisions["action"].tolist() == ["skipped", "skipped"]
    assert controller_of(run).decisions["broken"].tolist() == [2, 4]
    assert set(controller_of(run).allocation.vector) == {1}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "no rank was moved, for none of the 2 decisions had gradients to rest on: the gradients of 4 sampled steps were not "
        "finite; lower the learning rate or the loss scale"
    )


@pytest.fixture(scope="module")
def checkpoint(digits: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run = trainer(digits, folder, max_steps=4, save_steps=4)
    run.train()
    assert controller_of(run).decisions["action"].tolist() == ["moved"]
    return folder / "checkpoint-4"


def test_checkpoints_that_cannot_be_resumed(digits: Task, tmp_path: Path, checkpoint: Path) -> None:
    """Nothing is changed by any."""
    odd = tmp_path / "checkpoint-4"
    model = build(digits)
    before = {name: value.clone() for name, value in weights(model).items()}

    shutil.copytree(checkpoint, odd)
    saved = json.loads((checkpoint / "ranks.json").read_text())
    del saved["checksum"]  # as an older checkpoint, which says none
    (odd / "ranks.json").write_text(json.dumps({**saved, "ranks": {"x": 1, **saved["ranks"]}}))
    with refuses(
        ModelError,
        f"`{odd}` must hold ranks of this model's adapted modules, but `x` is in the checkpoint only (1 such); adapt the same "
        "modules.",
    ):
        trainer(digits, tmp_path / "run", model=model).train(resume_from_checkpoint=str(odd))

    name = "vit.layers.0.attention.q_proj"
    rank = saved["ranks"][name]
    (odd / "ranks.json").write_text(json.dumps({**saved, "ranks": {**saved["ranks"], name: rank + 1}}))
    with refuses(
        ModelError,
        f"`{odd}` must hold weights of the ranks in its ranks.json, but `{name}` has rank {rank} in the weights and {rank + 1} "
        "there; it mixes two checkpoints: use another.",
    ):
        trainer(digits, tmp_path / "run", model=model).train(resume_from_checkpoint=str(odd))

    (odd / "ranks.json").unlink()
    plain = rs.RankAllocation.from_peft_model(loaded(digits, checkpoint), rs.find_targets(digits.build_model())).ranks
    name, rank = next((name, rank) for name, rank in plain.items() if rank != 1)
    with refuses(
        ModelError,
        f"`{odd}` must hold weights of the model's ranks, or its own ranks.json beside them, but `{name}` has rank {rank} in "
        "the weights and 1 in the model; it was not finished, or is of another model: use another.",
    ):
        trainer(digits, tmp_path / "run", model=model).train(resume_from_checkpoint=str(odd))
    assert weights(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())

    shutil.copy(checkpoint / "ranks.json", odd)
    (odd / STATE_FILE).unlink()
    message = (
        f"the checkpoint of step 4 must hold {STATE_FILE} to be resumed with a controller, but does not; it was trained without "
        "one, or not finished: resume from another."
    )
    with refuses(ModelError, message):
        trainer(digits, tmp_path / "run").train(resume_from_checkpoint=str(odd))


def test_states_that_cannot_be_read(digits: Task, tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoint, folder)
    whole = (checkpoint / STATE_FILE).read_bytes()
    for content in (b"", b"hello world" * 10, whole[:2000]):
        (folder / STATE_FILE).write_bytes(content)
        message = rf"^`{re.escape(str(folder / STATE_FILE))}` must be a controller's state, but cannot be read \(\w+\); it is cut "
        with pytest.raises(ModelError, match=message):
            trainer(digits, tmp_path / "run").train(resume_from_checkpoint=str(folder))
    torch.save([1, 2], folder / STATE_FILE)
    with refuses(ModelError, "the controller's state must be a dict, but is a list."):
        trainer(digits, tmp_path / "run").train(resume_from_checkpoint=str(folder))


def test_an_adapter_that_peft_loaded(digits: Task, tmp_path: Path, checkpoint: Path) -> None:
    """Its modules are those that had a rank: it can be trained on, but not resumed, which is said in one line."""
    loaded_by_peft = PeftModel.from_pretrained(digits.build_model(), str(checkpoint), is_trainable=True)
    asleep = [name for name, rank in json.loads((checkpoint / "ranks.json").read_text())["ranks"].items() if not rank]
    run = trainer(digits, tmp_path, model=loaded_by_peft, save_strategy="no")
    message = (
        f"`{checkpoint}` must hold ranks of this model's adapted modules, but `{min(asleep)}` is in the checkpoint only "
        f"({len(asleep)} such); wrap the base model as for the first run, since PeftModel.from_pretrained leaves modules of rank "
        "0 out."
    )
    with refuses(ModelError, message):
        run.train(resume_from_checkpoint=str(checkpoint))
    run.train()
    assert len(controller_of(run).decisions) == 3


class Raises(TrainerCallback):
    """Raises at a step that is sampled, before one that is, or while gradients are computed."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.where, state.global_step) == ("on_step_end", 1):
            raise KeyError("once")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.where, state.global_step) == ("on_optimizer_step", 1):
            raise KeyError("once")

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.where in ("forward", "backward"):
            layer = model.get_base_model().vit.layers[0].mlp.fc2
            hook = (
                (lambda *_: {}["once"])
                if self.where == "forward"
                else (lambda *a: a[-1].register_hook(lambda _: {}["once"]) and None)
            )
            layer.register_forward_hook(hook)


@pytest.mark.parametrize("bind", [False, True])
@pytest.mark.parametrize("where", ["on_step_end", "on_optimizer_step", "forward", "backward"])
def test_a_second_training_after_one_that_failed(digits: Task, tmp_path: Path, where: str, bind: bool) -> None:
    """Nothing of the first run's controller stays on model, optimizer or Trainer."""
    run = trainer(digits, tmp_path, callbacks=(failing := Raises(where),), save_strategy="no", bind=bind)
    with pytest.raises(KeyError):
        run.train()
    if where in ("forward", "backward"):
        run.model.get_base_model().vit.layers[0].mlp.fc2._forward_hooks.popitem()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
    assert not run.optimizer.optimizer._optimizer_step_post_hooks
    run.remove_callback(failing)
    run.train()
    assert controller_of(run).decisions["step"].tolist() == [3, 6, 9]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
    assert "training_step" not in vars(run)


def test_models_are_copied_and_saved_whole_in_a_trainer(digits: Task, tmp_path: Path) -> None:
    """At every step, as for a moving average; the copy loads adapters into itself."""

    class Copies(TrainerCallback):
        last: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            self.last = copy.deepcopy(model)
            torch.save(model, tmp_path / "model.pt")

    copying, plain = Copies(), trainer(digits, tmp_path / "plain", save_strategy="no")
    run = trainer(digits, tmp_path, callbacks=(copying,), save_strategy="no")
    for each in (run, plain):
        each.train()
    ends_the_same(run, plain)
    assert copying.last.load_adapter.__self__ is copying.last
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again, digits), logits(copying.last, digits))


def test_what_the_trainer_says_cannot_be_passed(digits_budget: rs.ParameterBudget) -> None:
    with refuses(SettingsError, "`total_steps` comes from the Trainer and cannot be passed; leave it out."):
        rs.RankControllerCallback(budget=digits_budget, total_steps=10)
    with refuses(SettingsError, "unknown key `evry`; did you mean `every`?"):
        rs.RankControllerCallback(budget=digits_budget, evry=5)
    with refuses(
        SettingsError,
        "`budget` must be ParameterBudget | int, but got '5000'; see `help(rankscope.RankControllerCallback)`.",
    ):
        rs.RankControllerCallback(budget="5000")  # type: ignore[arg-type]
