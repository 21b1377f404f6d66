"""Ranks beside a checkpoint: resuming goes on as if never interrupted, and the best model loads, in transformers' Trainer."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import rankscope as rs
from rankscope.errors import FileError, ModelError
from rankscope.lora import (
    RankMasks,
    Resize,
    masks_on,
    resize_adapters,
    restore_ranks,
    restore_ranks_on_load,
    save_ranks,
)
from tests.lora.live_models import Kinds, kinds_model, layers, ranks, stir, tokens, train_step, trainable

PLAN = {"linear": 0, "table": 5, "convolution": 1}


def resizes(plan: dict[str, int]) -> list[Resize]:
    return [Resize(name=name, rank=rank) for name, rank in plan.items()]


def checkpoint(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    save_ranks(model, folder)
    return folder


@pytest.mark.parametrize("safetensors", [True, False])
def test_ranks_come_back_before_the_weights(tmp_path: Path, safetensors: bool) -> None:
    model = kinds_model()
    resize_adapters(model, None, resizes(PLAN))
    model.save_pretrained(str(tmp_path), safe_serialization=safetensors)
    save_ranks(model, tmp_path)
    fresh = kinds_model(seed=3)
    restore_ranks(fresh, tmp_path)
    assert ranks(fresh) == ranks(model)
    fresh.load_adapter(str(tmp_path), "default")
    states = [{k: v for k, v in m.state_dict().items() if "lora_" in k} for m in (model, fresh)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_an_optimizer_that_is_there_follows(tmp_path: Path) -> None:
    model = kinds_model()
    optimizer = torch.optim.AdamW(trainable(model))
    train_step(model, optimizer, 0)
    resize_adapters(model, optimizer, resizes(PLAN))
    folder = checkpoint(model, tmp_path)
    fresh = kinds_model()
    other = torch.optim.AdamW(trainable(fresh))
    restore_ranks(fresh, folder, optimizer=other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in trainable(fresh):
        assert all(v.shape == parameter.shape for v in other.state[parameter].values() if v.ndim)


@pytest.mark.parametrize("masked_before", [False, True])
def test_masks_and_the_weights_of_true_ranks_come_back(tmp_path: Path, masked_before: bool) -> None:
    names = ["linear", "transposed", "convolution"]
    model, fresh = (kinds_model(r=4, target_modules=names, seed=seed) for seed in (0, 5))
    masks = RankMasks(model)
    masks.resize(resizes({"linear": 2, "convolution": 0}))
    masks.resize(resizes({"linear": 3}))
    stir(model, seed=9)
    for name, layer in layers(model):
        layer.lora_B["default"].weight.data[:, [i for i in range(4) if i not in masks.active[name]]] = 0
    folder = checkpoint(model, tmp_path)
    restore_ranks_on_load(fresh)
    if masked_before:
        RankMasks(fresh)
    fresh.load_adapter(str(folder), "default")
    other = masks_on(fresh)
    assert other is not None
    assert other.active == masks.active
    fresh.get_base_model().load_state_dict(base_state(model), strict=False)
    assert torch.equal(fresh(tokens()), model(tokens()))
    for name, layer in layers(fresh):
        a = layer.lora_A["default"].weight
        assert all(a[i].any() for i in range(4))  # none is dead, should the masks be taken off
        assert torch.equal(layer.lora_B["default"].weight, dict(layers(model))[name].lora_B["default"].weight)


def base_state(model: PeftModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.get_base_model().state_dict().items() if "lora_" not in name}


def test_masks_that_do_not_fit_the_checkpoint_are_refused(tmp_path: Path) -> None:
    names = ["linear", "convolution"]
    model = kinds_model(r=4, target_modules=names)
    RankMasks(model, {"linear": 2})
    folder = checkpoint(model, tmp_path / "masked")
    refuses(
        kinds_model(r=3, target_modules=names),
        folder,
        f"masks must have the capacity of the checkpoint, but `convolution` has 3 and `{folder}` 4; wrap the model at that rank.",
    )
    live = checkpoint(kinds_model(r=4, target_modules=names), tmp_path / "live")
    refuses(
        model,
        live,
        f"`{live}` must hold masked ranks for a model that carries masks, but holds a live resize's; `compress` the masks.",
    )


# --- what is refused, and changes nothing ---------------------------------------------------------------------------


def refuses(model: PeftModel, folder: Path, message: str, kind: type[Exception] = ModelError) -> None:
    before = ranks(model), [id(p) for p in trainable(model)]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        restore_ranks(model, folder)
    assert (ranks(model), [id(p) for p in trainable(model)]) == before


def test_ranks_that_disagree_with_the_weights_are_refused(tmp_path: Path) -> None:
    model = kinds_model()
    folder = checkpoint(model, tmp_path)
    resize_adapters(model, None, resizes({"linear": 0}))
    save_ranks(model, folder)
    refuses(
        kinds_model(),
        folder,
        f"`{folder}` must hold weights of the ranks in its ranks.json, but `linear` has rank 2 in the weights and 0 there; "
        "it mixes two checkpoints: use another.",
    )
    resize_adapters(model, None, resizes({"linear": 2, "table": 3}))
    save_ranks(model, folder)
    refuses(
        kinds_model(),
        folder,
        f"`{folder}` must hold weights of the ranks in its ranks.json, but `table` has rank 2 in the weights and 3 there; "
        "it mixes two checkpoints: use another.",
    )


def test_other_models_and_files_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(kinds_model(target_modules=["linear", "table"]), tmp_path)
    refuses(
        kinds_model(target_modules=["linear"]),
        folder,
        f"`{folder}` must hold ranks of this model's adapted modules, but `table` is in the checkpoint only (1 such); "
        "adapt the same modules.",
    )
    refuses(
        kinds_model(),
        folder,
        f"`{folder}` must hold ranks of this model's adapted modules, but `convolution` is in the model only (2 such); "
        "adapt the same modules.",
    )
    path = folder / "ranks.json"
    saved = json.loads(path.read_text())
    saved.pop("checksum")
    model = kinds_model(target_modules=["linear", "table"])
    path.write_text(json.dumps(saved | {"schema": 7}))
    refuses(model, folder, f"`{path}` must have schema 1, but has 7; write it again.", FileError)
    path.write_text(json.dumps(saved | {"ranks": {"linear": "2"}}))
    refuses(
        model,
        folder,
        f"`{path}` must hold a rank for each module, but does not; it was edited: write it again.",
        FileError,
    )
    path.unlink()
    refuses(
        model,
        folder,
        f"`{path}` must hold an adapter's ranks, but there is no such file; check the path.",
        FileError,
    )


# --- transformers' Trainer ------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """As Trainer wants it: a loss in the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Kinds()

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(tokens)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Examples(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = tokens(index, 1)[0]
        return {"tokens": x, "labels": x.sum() % 3}


SCRIPT = {
    2: {"body.linear": 0, "body.table": 4},
    5: {"body.linear": 3, "body.transposed": 0},
    7: {"body.transposed": 2},
}


class Scripted(TrainerCallback):
    """Changes ranks at fixed steps, as a controller would, and saves them beside every checkpoint."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        plan = SCRIPT.get(state.global_step, {})
        generator = torch.Generator().manual_seed(state.global_step)
        resize_adapters(model, optimizer, resizes(plan), generator=generator)

    def on_save(self, args, state, control, model=None, **kwargs):
        save_ranks(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def trainer(folder: Path, **options) -> Trainer:
    names = [f"body.{name}" for name in ("table", "linear", "transposed", "convolution")]
    model = get_peft_model(Classifier(), LoraConfig(target_modules=names, r=2, lora_alpha=4))
    restore_ranks_on_load(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=9,
        per_device_train_batch_size=8,
        learning_rate=0.02,
        save_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        **options,
    )
    return Trainer(
        model=model, args=arguments, train_dataset=Examples(), eval_dataset=Examples(), callbacks=[Scripted()]
    )


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder)
    run.train()
    return run, folder


@pytest.mark.parametrize("step", [1, 3, 6, 8])
def test_resuming_goes_on_as_if_never_interrupted(
    uninterrupted: tuple[Trainer, Path], tmp_path: Path, step: int
) -> None:
    whole, folder = uninterrupted
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert rs.RankAllocation.from_peft_model(resumed.model) == rs.RankAllocation.from_peft_model(whole.model)
    ours, theirs = adapter_state(resumed.model), adapter_state(whole.model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (resumed, whole)]
    assert losses[0] == losses[1]


def test_the_best_model_loads_at_its_own_ranks(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="worst"
    )
    evaluate = run.evaluate

    def marked(*args, **kwargs):
        """Step 3 is called the best: then `linear` slept, and at the end it does not."""
        metrics = evaluate(*args, **kwargs) | {"eval_worst": float(run.state.global_step == 3)}
        return metrics

    run.evaluate = marked
    run.args.greater_is_better = True
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    assert {n: r for n, r in rs.RankAllocation.from_peft_model(run.model).ranks.items() if r != 2} == {
        "body.linear": 0,
        "body.table": 4,
    }
    plain = PeftModel.from_pretrained(Classifier(), str(tmp_path / "checkpoint-3"))
    ours, theirs = adapter_state(run.model), adapter_state(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_copy_of_a_model_loads_into_itself(tmp_path: Path) -> None:
    model = kinds_model()
    restore_ranks_on_load(model)
    twin = copy.deepcopy(model)
    other = kinds_model(seed=2)
    resize_adapters(other, None, resizes(PLAN))
    twin.load_adapter(str(checkpoint(other, tmp_path)), "default")
    assert ranks(twin) == ranks(other)
    assert ranks(model) == dict.fromkeys(ranks(model), 2)


def test_what_the_first_version_wrote_still_loads(tmp_path: Path) -> None:
    """One pattern for each module, all of the names in one regex, ranks of schema 1."""
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=r"^(?:table|transposed|convolution)$",
        rank_pattern={"^table": 5, "^convolution": 1},
        alpha_pattern={"^table": 10, "^convolution": 2},
    )
    old = get_peft_model(Kinds().double(), config, autocast_adapter_dtype=False)
    stir(old)
    old.save_pretrained(str(tmp_path))
    saved = {"schema": 1, "adapter": "default", "ranks": {"table": 5, "linear": 0, "transposed": 2, "convolution": 1}}
    (tmp_path / "ranks.json").write_text(json.dumps(saved))
    model = kinds_model()
    restore_ranks(model, tmp_path)
    assert ranks(model) == saved["ranks"]
    model.load_adapter(str(tmp_path), "default")
    for name, layer in layers(old):
        again = model.get_base_model().get_submodule(name).state_dict()
        assert all(torch.equal(again[key], value) for key, value in layer.state_dict().items() if "lora_" in key)


@pytest.mark.parametrize(
    "active",
    [{}, {"a": "01", "b": []}, {"a": [5], "b": [0]}, {"a": [0, 0], "b": [0, 1]}, {"a": [0], "b": [0, 1]}, 3.5, None],
)
def test_masks_that_were_edited_are_refused(active: object, tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(
        json.dumps({"schema": 1, "ranks": {"a": 2, "b": 2}, "active": active, "capacity": {"a": 2, "b": 2}})
    )
    net = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 4)})
    message = (
        f"`{path}` must hold the active components of each module within its capacity, but does not; it was edited: write it "
        "again."
    )
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        restore_ranks(get_peft_model(net, LoraConfig(r=2, target_modules=["a", "b"])), tmp_path)


def test_broken_weights_beside_ranks_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(kinds_model(), tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FileError, match=f"^`{re.escape(str(weights))}` must hold an adapter's weights"):
        restore_ranks(kinds_model(), folder)
