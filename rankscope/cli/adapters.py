"""`rankscope export` and `rankscope shrink`: what is done with allocations and adapters without a training."""

from __future__ import annotations

import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rankscope.allocation import RankAllocation
from rankscope.cli.session import (
    ALLOCATION,
    print_files,
    print_json,
    print_line,
    print_table,
    progress,
    quiet_libraries,
    stderr,
)
from rankscope.distributed import batch_device, mixed_precision, placed
from rankscope.errors import FileError
from rankscope.files import replacing, write_json
from rankscope.lora import CARD, ShrunkAdapter, export, load_adapter, measure_moments, pad_adapter, read_adapter, shrink
from rankscope.plotting import plot_ranks, save_plot
from rankscope.settings import StudySettings
from rankscope.tasks import Task, evaluate, load_task
from rankscope.training import add_to_card

_HINTS = {
    "peft": "save it as adapter_config.json; `LoraConfig.from_pretrained(folder)` reads it. Set its `task_type`, as "
    "CAUSAL_LM, for `AutoPeftModel`",
    "axolotl": "put these keys into the axolotl YAML, and leave `lora_target_linear` out",
    "kohya": "for sd-scripts' --config_file; names must be those of the model that it builds. Scaling is 1: tune the "
    "learning rate again",
    "unsloth": "load the model with `FastLanguageModel.from_pretrained` first",
    "trl": "any trainer of TRL takes this `peft_config`",
}


# --- export -------------------------------------------------------------------------------------------------------


def run_export(source: Path, to: str, out: Path | None, **options: Any) -> None:
    """`rankscope export --to`."""
    allocation, own = _ranks_of(source)
    text = export(
        allocation, to, **own | {key: value for key, value in options.items() if value not in (None, 0.0, [])}
    )
    if out is None:
        sys.stdout.write(text)
    else:
        with replacing(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print_files([out])
    stderr.print(_HINTS[to], soft_wrap=True)


def _ranks_of(source: Path) -> tuple[RankAllocation, dict[str, Any]]:
    """The allocation of a file or folder, and of an adapter also its own scaling and dropout."""
    if source.is_dir() and not (source / ALLOCATION).exists():
        if not (source / "adapter_config.json").exists():
            raise FileError(
                f"`{source}` must hold {ALLOCATION} or be an adapter's folder, but is neither; check the path."
            )
        saved = read_adapter(source)
        scalings = set(saved.scalings.values())
        own = {"scaling": scalings.pop()} if len(scalings) == 1 else {}
        config = saved.config
        return saved.allocation, own | {
            "lora_dropout": config.lora_dropout,
            "modules_to_save": list(config.modules_to_save or ()),
        }
    return RankAllocation.from_json(source / ALLOCATION if source.is_dir() else source), {}


def run_pad(adapter: Path, out: Path | None) -> None:
    """`rankscope export --padded`."""
    padded = pad_adapter(adapter, out or _beside(adapter, "padded"))
    print_line(
        f"the largest rank is {padded.largest}; every module now has rank {padded.rank}, with the same function: "
        f"`vllm serve MODEL --enable-lora --max-lora-rank {padded.rank}`"
    )
    if padded.not_in_vllm:
        print_line(f"vLLM does not load {' and '.join(padded.not_in_vllm)}, which this adapter has; merge it for vLLM")
    print_files([padded.path])


def _beside(adapter: Path, what: str) -> Path:
    place = adapter.resolve()
    return adapter.parent / f"{place.name}-{what}" if adapter.name else place.parent / f"{place.name}-{what}"


# --- shrink -------------------------------------------------------------------------------------------------------


def run_shrink(
    adapter: Path,
    parameters: int,
    study: StudySettings | None,
    out: Path | None,
    *,
    rule: str,
    n_batches: int,
    as_json: bool,
) -> None:
    """`rankscope shrink`."""
    quiet_libraries()
    out = out or _beside(adapter, "shrunk")
    read_adapter(adapter)  # says what is wrong before a model is built
    task = None if study is None else load_task(study.task, base_dir=study.base_dir)
    moments, metrics = None, {}
    if task is not None:
        with progress("evaluating"):
            model = load_adapter(placed(task.build_model()), adapter)
            metrics["before"] = evaluate(task, model)
        moments = _moments(task, model, n_batches)
        del model
    shrunk = shrink(adapter, parameters, out, rule=rule, moments=moments)
    if task is not None:
        with progress("evaluating"):
            metrics["after"] = evaluate(task, load_adapter(placed(task.build_model()), out))
    titles = [
        f"{title}: {each.parameters:,} parameters"
        for title, each in (("before", shrunk.before), ("after", shrunk.after))
    ]
    report = {
        "adapter": str(adapter),
        "rule": rule,
        "weighed_by": "weights" if moments is None else "inputs and gradients",
        "parameters": {"before": shrunk.before.parameters, "after": shrunk.after.parameters},
        "energy_kept": shrunk.kept,
        "ranks": dict(shrunk.after.ranks),
        "energies": {name: energy.tolist() for name, energy in shrunk.energies.items()},
        "metrics": metrics,
    }
    write_json(out / "shrink.json", report)
    if (out / CARD).exists():
        told = [f"{_share(shrunk.kept)} of the update's energy is kept (by {report['weighed_by']}, rule `{rule}`)."]
        told += [
            f"{when} it: {', '.join(f'{k} {v:.4g}' for k, v in each.items())} (validation)."
            for when, each in metrics.items()
        ]
        add_to_card(out, f"Shrunk from {shrunk.before.parameters:,} parameters", told)
    shrunk.after.to_json(out / ALLOCATION)
    picture = save_plot(partial(plot_ranks, shrunk.before, shrunk.after, titles=titles), out / "ranks.png")
    files = [out, picture, out / ALLOCATION, out / "shrink.json"]
    if as_json:
        print_json({key: value for key, value in report.items() if key != "energies"}, files)
        return
    _print_shrunk(shrunk, str(report["weighed_by"]), task, metrics)
    print_files(files)


def _moments(task: Task, model: Any, n_batches: int) -> Any:
    """What the task's training data sends through the adapter."""
    from accelerate.utils import send_to_device

    device = batch_device(model)

    def loss(model: Any, batch: Any) -> Any:
        with mixed_precision(model):
            return task.loss(model, send_to_device(batch, device))

    with progress("weighing") as update:
        batches = enumerate(islice(task.train_batches(0), n_batches))
        return measure_moments(model, (update(done, n_batches) or batch for done, batch in batches), loss)


def _share(kept: float) -> str:
    """A fraction in per cent; what is cut is not rounded away.

    >>> _share(1.0), _share(0.99996), _share(0.5)
    ('100.0%', 'over 99.9%', '50.0%')
    """
    return "over 99.9%" if 0.9995 <= kept < 1.0 - 1e-9 else f"{kept:.1%}"


def _print_shrunk(shrunk: ShrunkAdapter, by: str, task: Task | None, metrics: dict[str, dict[str, float]]) -> None:
    """Ranks and energy by tower and role, and the metric before and after."""
    before, after = shrunk.before, shrunk.after
    print_line(
        f"{before.parameters:,} -> {after.parameters:,} parameters; {_share(shrunk.kept)} of the energy is kept (by {by})"
    )
    groups: dict[str, list[int]] = {}
    for place, target in enumerate(before.targets):
        groups.setdefault(f"{target.tower} {target.role}", []).append(place)
    rows = []
    for group, places in groups.items():
        names = [before.targets[place].name for place in places]
        whole = sum(float(shrunk.energies[name].sum()) for name in names)
        left = sum(float(shrunk.energies[name][: after.ranks[name]].sum()) for name in names)
        rows.append(
            {
                "group": group,
                "modules": f"{sum(after.vector[place] > 0 for place in places)} of {len(places)}",
                "before": np.mean([before.vector[place] for place in places]),
                "after": np.mean([after.vector[place] for place in places]),
                "kept": _share(left / whole) if whole else "-",
            }
        )
    columns = {
        "group": "{group}",
        "adapted": "{modules}",
        "mean rank": "{before:.2f}",
        "now": "{after:.2f}",
        "energy kept": "{kept}",
    }
    print_table("by tower and role", columns, rows)
    if task is not None:
        names = [name for name in (task.metric, "loss") if name in metrics["before"]]
        told = ", ".join(f"{name} {metrics['before'][name]:.4g} -> {metrics['after'][name]:.4g}" for name in names)
        print_line(f"validation: {told}")
