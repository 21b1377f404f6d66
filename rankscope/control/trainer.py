"""`RankControllerCallback`: the controller in transformers' Trainer, and so in TRL's trainers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from transformers import Trainer, TrainerCallback

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control.controller import RankController
from rankscope.errors import ModelError, SettingsError, checked
from rankscope.files import replacing
from rankscope.lora import LiveAdapter, loaded_from, restore_ranks_on_load, save_ranks
from rankscope.settings import ControllerSettings

STATE_FILE = "rank_controller.pt"


class _TrainersController(RankController):
    """Its hooks are on the model during the passes of sampled steps only, since a training that raises ends without a call."""

    def _go_on(self) -> None:
        self._reminder.remove()
        if self.frozen:
            self._end()

    def begin_step(self) -> None:
        """The forward and backward passes of a step begin."""
        if not self.frozen:
            super()._go_on()

    def end_passes(self) -> None:
        """They are over."""
        self._window.end_step()


class RankControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Runs a `RankController` during a Trainer's training; pass it to the Trainer's constructor.

    Each checkpoint gets the ranks (`ranks.json`) and, last of all its files, the controller's state.
    `resume_from_checkpoint` and `load_best_model_at_end` give the model the checkpoint's ranks before its weights. The
    scalars of each decision go to the log history. With `torch_compile` ranks are masked.

    A Trainer does not show itself to callbacks. `bind(trainer)` adds what needs it: the scalars also go to TensorBoard, W&B and
    other reporters; a model that `model_init` makes can be resumed; no hook stays on the model, whatever raises in a training.
    Without, the hooks of a step go if its forward or backward pass raises, and Ctrl-C may leave them until the next training.

    Args:
        budget: The most adapter parameters at any time.
        start: As `RankController` takes it.
        **overrides: Single `ControllerSettings`.

    >>> callback = RankControllerCallback(budget=ParameterBudget(2_000_000), every=50)
    >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    >>> callback.bind(trainer)  # doctest: +SKIP
    """

    controller: _TrainersController  # a `RankController`, once training has begun

    @checked
    def __init__(
        self,
        *,
        budget: ParameterBudget | int,
        settings: ControllerSettings | Mapping[str, Any] | None = None,
        start: RankAllocation | str | None = None,
        **overrides: Any,
    ) -> None:
        if clash := {"total_steps", "model", "optimizer"} & set(overrides):
            raise SettingsError(f"`{min(clash)}` comes from the Trainer and cannot be passed; leave it out.")
        self._budget, self._start = ParameterBudget.of(budget), start
        self._settings = ControllerSettings.of(settings, **overrides)
        self._trainer: Trainer | None = None

    def bind(self, trainer: Trainer) -> Self:
        """Use what only the Trainer has, and join its callbacks; call it before `trainer.train()`."""
        if not hasattr(trainer, "callback_handler"):
            raise SettingsError(f"`trainer` must be a transformers Trainer, but got a {type(trainer).__name__}.")
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
            self._prepared(trainer.model)  # `on_init_end` has passed, and a checkpoint loads before training begins
        self._trainer, train = trainer, trainer.train

        def train_and_close(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:  # `on_train_end` does not come where a training raises
                self.on_train_end(None, None, None)

        trainer.train = train_and_close
        if trainer.model_init is not None:
            make = trainer.call_model_init
            trainer.call_model_init = lambda trial=None: self._prepared(make(trial))
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Make later loads of a checkpoint restore its ranks first."""
        self._prepared(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Start the controller: the optimizer and the number of steps are known."""
        self.on_train_end(args, state, control)  # a run before may have raised
        self._prepared(model)  # again, if the Trainer was given the callback later
        settings, start, saved = self._settings, self._start, None
        if args.torch_compile and settings.rank_change == "auto":
            settings = ControllerSettings.of(settings, rank_change="mask")
        if state.global_step > 0:
            start, saved = None, _saved_state(loaded_from(model, self._adapter), state.global_step)
        self.controller = _TrainersController(
            model, optimizer, budget=self._budget, settings=settings, total_steps=state.max_steps, start=start
        )
        if saved is not None:
            try:
                self.controller.load_state_dict(saved)
            except BaseException:
                self.controller.close()
                raise

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first batch is here."""
        self.controller.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are complete, and clipped."""
        self.controller.end_passes()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped and gradients are zero."""
        self.controller.step()
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
        """Leave nothing of the controller on the model but masks, if ranks are masked."""
        if hasattr(self, "controller"):
            self.controller.close()

    def _prepared(self, model: Any) -> Any:
        """The model, which has the adapter to control and whose later loads restore ranks first."""
        self._adapter = LiveAdapter(model, self._settings.adapter_name).name  # raises unless there is one to control
        restore_ranks_on_load(model)
        return model


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
