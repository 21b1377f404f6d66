"""`RankControllerCallback`: the controller in transformers' Trainer, and so in TRL's trainers."""

from __future__ import annotations

import inspect
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from rankscope.budget import ParameterBudget
from rankscope.control.controller import RankController, check_types
from rankscope.errors import ModelError
from rankscope.files import replacing
from rankscope.lora import choose_adapter, loaded_from, restore_ranks_on_load, save_ranks, unwrap_peft_model

logger = logging.getLogger(__name__)


STATE_FILE = "rank_controller.pt"


class RankControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Runs a `RankController` over a Trainer's run; `total_steps` comes from the Trainer.

    The effect of moves is measured on the loss that the Trainer minimises (`Trainer.training_step`), whatever the model itself
    returns. Each checkpoint gets the ranks (`ranks.json`) and, last of all its files, the controller's state beside the weights.
    `resume_from_checkpoint` and `load_best_model_at_end` give the model the checkpoint's ranks before its weights. Scalars of
    each decision go to the log history and to all that the Trainer reports to (TensorBoard, W&B).

    Ranks are masked under several processes and with `torch_compile`; what the Trainer saves then is at the true ranks, too.
    Pass the callback to the Trainer's constructor, which is where it prepares the model for resuming.

    Args:
        budget: The most adapter parameters at any time.
        every: Optimizer steps between decisions.
        **settings: What else `RankController` takes, as in `freeze_fraction=0.3` or `start="one-shot"`; `adapter_name` where the
            model has several adapters (TRL's DPOTrainer adds `ref` to a PEFT model).

    Attributes:
        controller: From the beginning of the training on.

    Raises:
        ModelError: A setting that the Trainer gives; when resuming, a checkpoint without the controller's state.

    >>> callback = RankControllerCallback(budget=ParameterBudget(2_000_000), every=50)
    >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, *, budget: ParameterBudget, every: int = 50, **settings: Any) -> None:
        if clash := {"total_steps", "model", "optimizer"} & set(settings):
            raise ModelError(f"`{min(clash)}` comes from the Trainer and cannot be passed; leave it out.")
        known = sorted(inspect.signature(RankController).parameters)
        if unknown := set(settings) - set(known):
            raise ModelError(f"`{min(unknown)}` must be a setting of RankController, which has {', '.join(known)}.")
        check_types(budget=budget)
        self._settings = {"budget": budget, "every": every, **settings}
        self._trainer: Trainer | None = None
        self._losses: _StepLosses | None = None
        self.controller: RankController | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Make later loads of a checkpoint restore its ranks first, also into models that `model_init` makes."""
        self._prepare(model)
        trainer = _calling_trainer()
        if trainer is not None and trainer.model_init is not None:
            make = trainer.call_model_init

            def make_prepared(trial: Any = None) -> Any:
                made = make(trial)
                self._prepare(made)
                return made

            trainer.call_model_init = make_prepared

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Start the controller: the optimizer and the number of steps are known."""
        self._stop()  # what a run that raised left behind
        adapter = self._prepare(model)
        settings, saved = dict(self._settings), None
        if args.torch_compile and settings.get("mode", "auto") == "auto":
            settings["mode"] = "mask"
        if state.global_step > 0:
            saved, settings["start"] = _saved_state(loaded_from(model, adapter), state.global_step), None
        controller = RankController(model, optimizer, total_steps=state.max_steps, **settings)
        try:
            if saved is not None:
                controller.load_state_dict(saved)
        except BaseException:
            controller.close()
            raise
        self.controller, self._trainer = controller, _calling_trainer()
        if self._trainer is None:
            logger.warning(
                "no Trainer calls the callback, so no training loss is recorded and no move's effect measured"
            )
        else:
            self._losses = _StepLosses(self._trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped and gradients are zero."""
        controller = self._running()
        decided = controller.n_decisions
        controller.step(math.nan if self._losses is None else self._losses.take())
        if controller.n_decisions > decided and self._trainer is not None:
            should_log = control.should_log
            Trainer.log(self._trainer, controller.scalars())  # TRL's own `log` would empty the metrics that it averages
            control.should_log = should_log  # which logging takes back

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Write ranks and state beside the weights."""
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
        """Leave nothing of the controller on the model but masks where ranks are masked."""
        self._running()
        self._stop()

    def _prepare(self, model: Any) -> str:
        """The adapter to control. Repeated when training begins, for a callback that the Trainer was given later."""
        adapter = choose_adapter(unwrap_peft_model(model), self._settings.get("adapter_name"))
        restore_ranks_on_load(model)
        return adapter

    def _running(self) -> RankController:
        if self.controller is None:
            raise ModelError("the controller must be started by `on_train_begin`; pass the callback to a Trainer.")
        return self.controller

    def _stop(self) -> None:
        if self.controller is not None:
            self.controller.close()
        if self._losses is not None:
            self._losses.close()
        self._trainer = self._losses = None


class _StepLosses:
    """The loss that a Trainer minimises: what its `training_step` returns, which it sums up for its own log, too.

    That is the loss after label smoothing, `compute_loss_func`, or a preference loss as DPO's, and already divided by the
    number of micro-batches of a step. The model's own `loss` is often another.

    Args:
        trainer: Whose `training_step` is wrapped until `close`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._wrapped = trainer, trainer.training_step
        self._overridden = "training_step" in vars(trainer)
        self._seen: list[Tensor] = []
        trainer.training_step = self._training_step

    def take(self) -> Tensor | float:
        """The sum over micro-batches since the last call, left on the device; NaN where there was none."""
        seen, self._seen = self._seen, []
        return torch.stack(seen).sum() if seen else math.nan

    def close(self) -> None:
        """Give the Trainer its own `training_step` back, unless another has wrapped this one."""
        if vars(self._trainer).get("training_step") != self._training_step:
            return
        if self._overridden:
            self._trainer.training_step = self._wrapped
        else:
            del self._trainer.training_step

    def _training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = self._wrapped(*args, **kwargs)
        self._seen.append(loss.detach().float())
        return loss


def _calling_trainer() -> Trainer | None:
    """The Trainer that is calling. It hands callbacks neither itself nor its losses, so it is looked up on the stack."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _saved_state(folder: Path | None, step: int) -> Any:
    """The controller's state in a checkpoint.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
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
