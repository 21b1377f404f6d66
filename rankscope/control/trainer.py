"""`RankControllerCallback`: the controller in transformers' Trainer, and so in TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from rankscope.budget import ParameterBudget
from rankscope.control.controller import RankController, check_budget
from rankscope.errors import ModelError, SettingsError
from rankscope.files import replacing
from rankscope.lora import LiveAdapter, loaded_from, restore_ranks_on_load, save_ranks
from rankscope.settings import ControllerSettings

STATE_FILE = "rank_controller.pt"


class RankControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Runs a `RankController` during a Trainer's training; pass it to the Trainer's constructor.

    Each checkpoint gets the ranks (`ranks.json`) and, last of all its files, the controller's state.
    `resume_from_checkpoint` and `load_best_model_at_end` give the model the checkpoint's ranks before its weights. The
    scalars of each decision go to the log history. With `torch_compile` ranks are masked.

    A Trainer does not show itself to callbacks. `bind(trainer)` adds what needs it: moves are judged by the loss that the Trainer
    minimises, not by the one that the model returns (label smoothing, DPO, own losses); the scalars also go to TensorBoard, W&B
    and other reporters; a model that `model_init` makes can be resumed.

    Args:
        budget: The most adapter parameters at any time.
        **options: `start` or `performance_model` of `RankController`, or single `ControllerSettings`.

    >>> callback = RankControllerCallback(budget=ParameterBudget(2_000_000), every=50)
    >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    >>> callback.bind(trainer)  # doctest: +SKIP
    """

    controller: RankController  # once training has begun

    def __init__(self, *, budget: ParameterBudget, settings: ControllerSettings | None = None, **options: Any) -> None:
        if clash := {"total_steps", "model", "optimizer"} & set(options):
            raise SettingsError(f"`{min(clash)}` comes from the Trainer and cannot be passed; leave it out.")
        check_budget(budget)
        self._options: dict[str, Any] = {"budget": budget}
        self._options |= {name: options.pop(name) for name in ("start", "performance_model") if name in options}
        self._settings = ControllerSettings.of(settings, **options)
        self._trainer: Trainer | None = None
        self._losses: list[Tensor] = []
        self._cleanup = ExitStack()  # closes the controller and takes the patch off the Trainer

    def bind(self, trainer: Trainer) -> Self:
        """Use what only the Trainer has, and join its callbacks; call it before `trainer.train()`."""
        if not hasattr(trainer, "callback_handler"):
            raise SettingsError(f"`trainer` must be a transformers Trainer, but got a {type(trainer).__name__}.")
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
            self._prepared(trainer.model)  # `on_init_end` has passed, and a checkpoint loads before training begins
        self._trainer = trainer
        if trainer.model_init is not None:
            make = trainer.call_model_init
            trainer.call_model_init = lambda trial=None: self._prepared(make(trial))
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Make later loads of a checkpoint restore its ranks first."""
        self._prepared(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Start the controller: the optimizer and the number of steps are known."""
        self._cleanup.close()  # what a run that raised left behind
        self._prepared(model)  # again, if the Trainer was given the callback later
        settings, options, resumed = self._settings, self._options, state.global_step > 0
        if args.torch_compile and settings.rank_change == "auto":
            settings = ControllerSettings.of(settings, rank_change="mask")
        if resumed:
            saved, options = (
                _saved_state(loaded_from(model, self._adapter), state.global_step),
                {**options, "start": None},
            )
        with ExitStack() as stack:
            controller = RankController(model, optimizer, settings=settings, total_steps=state.max_steps, **options)
            stack.enter_context(controller)
            if resumed:
                controller.load_state_dict(saved)
            if self._trainer is not None:
                stack.callback(self._record_losses(self._trainer))
            self.controller, self._losses, self._cleanup = controller, [], stack.pop_all()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped and gradients are zero."""
        losses, self._losses = self._losses, []
        self.controller.step(torch.stack(losses).sum() if losses else None)
        decision = self.controller.last_decision
        if decision is None or decision.step != state.global_step:
            return
        if self._trainer is None:
            state.log_history.append({**decision.scalars(), "epoch": state.epoch, "step": state.global_step})
        else:
            should_log = control.should_log
            Trainer.log(self._trainer, decision.scalars())  # TRL's own `log` would empty the metrics that it averages
            control.should_log = should_log  # which logging takes back

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Write ranks and state beside the weights."""
        values = self.controller.state_dict()  # on every process: it asks them all
        if not state.is_world_process_zero:
            return
        subfolder = "" if self._adapter == "default" else self._adapter  # where PEFT puts its weights
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / subfolder
        save_ranks(model, folder, adapter_name=self._adapter)
        with replacing(folder / STATE_FILE) as temporary:
            torch.save(values, temporary)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave nothing of the controller on model and Trainer but masks, if ranks are masked."""
        self._cleanup.close()

    def _prepared(self, model: Any) -> Any:
        """The model, which has the adapter to control and whose later loads restore ranks first."""
        self._adapter = LiveAdapter(model, self._settings.adapter_name).name  # raises unless there is one to control
        restore_ranks_on_load(model)
        return model

    def _record_losses(self, trainer: Trainer) -> Callable[[], None]:
        """Patch `training_step`, which returns each micro-batch's share of the loss that is minimised; returns the undoing."""
        step, own = trainer.training_step, "training_step" in vars(trainer)

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = step(*args, **kwargs)
            self._losses.append(loss.detach().float())
            return loss

        trainer.training_step = training_step
        return partial(setattr, trainer, "training_step", step) if own else partial(delattr, trainer, "training_step")


def _saved_state(folder: Path | None, step: int) -> Any:
    """The controller's state in a checkpoint."""
    if folder is None or not (path := folder / STATE_FILE).exists():
        raise ModelError(
            f"the checkpoint of step {step} must hold {STATE_FILE} to be resumed with a controller, but does not; it was "
            "trained without one, or not finished: resume from another."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever the objects that it names raise
        raise ModelError(
            f"`{path}` must be a controller's state, but cannot be read ({type(error).__name__}); it is cut short or of "
            "another program: resume from another checkpoint."
        ) from error
