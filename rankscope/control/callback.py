"""`RankControllerCallback`: the controller in transformers' Trainer, and so in TRL's trainers."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from rankscope.adapters import restore_ranks_on_load, save_ranks
from rankscope.adapters.live import choose_adapter, unwrap_peft_model
from rankscope.budget import ParameterBudget
from rankscope.control.controller import RankController
from rankscope.exceptions import ControlError
from rankscope.files import replacing

STATE_FILE = "rank_controller.pt"


class RankControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Runs a `RankController` over a Trainer's run; `total_steps` comes from the Trainer.

    Each checkpoint gets the ranks (`ranks.json`) and, last of all its files, the controller's state beside the weights.
    `resume_from_checkpoint` and `load_best_model_at_end` give the model the checkpoint's ranks before its weights. Scalars of
    each decision go to the log history and to all that the Trainer reports to (TensorBoard, W&B).

    Ranks are masked under several processes and with `torch_compile`; what the Trainer saves then is at the true ranks, too.
    Pass the callback to the Trainer's constructor, which is where it prepares the model for resuming; a model that `model_init`
    makes again when training begins cannot be resumed.

    Args:
        budget: The most adapter parameters at any time.
        every: Optimizer steps between decisions.
        **settings: What else `RankController` takes, as in `freeze_fraction=0.3` or `start="one-shot"`.

    Attributes:
        controller: From the beginning of the training on.

    Raises:
        ControlError: A setting that the Trainer gives; when resuming, a checkpoint without the controller's state.

    >>> callback = RankControllerCallback(budget=ParameterBudget(2_000_000), every=50)
    >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, *, budget: ParameterBudget, every: int = 50, **settings: Any) -> None:
        if clash := {"total_steps", "model", "optimizer"} & set(settings):
            raise ControlError(f"`{min(clash)}` comes from the Trainer and cannot be passed; leave it out.")
        self._settings = {"budget": budget, "every": every, **settings}
        self._prepared: Any = None
        self._loaded_from: Path | None = None
        self.controller: RankController | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """From now on, loading a checkpoint restores its ranks first."""
        self._prepare(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Optimizer and number of steps are known."""
        self._prepare(model)
        settings, saved = dict(self._settings), None
        if args.torch_compile and settings.get("mode", "auto") == "auto":
            settings["mode"] = "mask"
        if state.global_step > 0:
            saved, settings["start"] = self._saved_state(state.global_step), None
        self.controller = RankController(model, optimizer, total_steps=state.max_steps, **settings)
        if saved is not None:
            self.controller.load_state_dict(saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped and gradients are zero."""
        controller = self._running()
        decided = controller.n_decisions
        controller.step()
        if controller.n_decisions > decided:
            _log(controller.scalars(), args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Ranks and state go beside the weights."""
        controller = self._running()
        values = controller.state_dict()  # on every process: it asks them all
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if controller.adapter_name != "default":
            folder /= controller.adapter_name  # where PEFT puts its weights
        save_ranks(model, folder, adapter_name=controller.adapter_name)
        with replacing(folder / STATE_FILE) as temporary:
            torch.save(values, temporary)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing of the controller stays on the model, but masks where ranks are masked."""
        self._running().close()

    def _prepare(self, model: Any) -> None:
        """Once for each model: a Trainer with `model_init` makes another when it trains."""
        if self._prepared is model:
            return
        self._prepared = model
        controlled = choose_adapter(unwrap_peft_model(model), self._settings.get("adapter_name"))
        restore_ranks_on_load(model)
        load = model.load_adapter

        def load_adapter(model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
            if adapter_name == controlled:
                self._loaded_from = Path(model_id)
            return load(model_id, adapter_name, *args, **kwargs)

        model.load_adapter = load_adapter

    def _running(self) -> RankController:
        if self.controller is None:
            raise ControlError("the controller must be started by `on_train_begin`; pass the callback to a Trainer.")
        return self.controller

    def _saved_state(self, step: int) -> Any:
        if self._loaded_from is None or not (path := self._loaded_from / STATE_FILE).exists():
            raise ControlError(
                f"the checkpoint of step {step} must hold {STATE_FILE} to be resumed with a controller, but does not; it was "
                "trained without one, or not finished: resume from another."
            )
        return torch.load(path, map_location="cpu", weights_only=True)


def _log(scalars: dict[str, float], args: Any, state: Any, control: Any) -> None:
    """As `Trainer.log`, to the history and to every callback that reports.

    The Trainer hands callbacks neither itself nor their list, so the list is taken from the stack, where it is what called.
    It gets a copy of `control`, on which `on_log` takes back the Trainer's own intention to log at this step.
    """
    logs = scalars if state.epoch is None else {**scalars, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        frame.f_locals["self"].on_log(args, state, copy.copy(control), logs=dict(logs))
