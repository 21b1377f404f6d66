"""`RankControllerCallback`: the controller in transformers' Trainer, and so in TRL's trainers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rankscope.adapters import restore_ranks_on_load, save_ranks
from rankscope.budget import ParameterBudget
from rankscope.control.controller import RankController
from rankscope.exceptions import ControlError
from rankscope.files import replacing

STATE_FILE = "rank_controller.pt"


class RankControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Runs a `RankController` over a Trainer's run; `total_steps` comes from the Trainer.

    Each checkpoint gets the ranks (`ranks.json`) and the controller's state beside it. `resume_from_checkpoint` and
    `load_best_model_at_end` give the model the checkpoint's ranks before its weights. Scalars of each decision go to the
    Trainer's log history; to send them to its loggers (TensorBoard, W&B) too, set `callback.log = trainer.log`.

    Args:
        budget: The most adapter parameters at any time.
        every: Optimizer steps between decisions.
        **settings: What else `RankController` takes, as in `freeze_fraction=0.3` or `start="one-shot"`.

    Attributes:
        controller: From the beginning of the training on.
        log: Where scalars go; None: to the log history only.

    >>> callback = RankControllerCallback(budget=ParameterBudget(2_000_000), every=50)
    >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, *, budget: ParameterBudget, every: int = 50, **settings: Any) -> None:
        if clash := {"total_steps", "model", "optimizer"} & set(settings):
            raise ControlError(f"`{min(clash)}` comes from the Trainer and cannot be passed; leave it out.")
        self._settings = {"budget": budget, "every": every, **settings}
        self._loaded_from: Path | None = None
        self.controller: RankController | None = None
        self.log: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """From now on, loading a checkpoint restores its ranks first."""
        restore_ranks_on_load(model)
        load = model.load_adapter

        def load_adapter(model_id: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
            self._loaded_from = Path(model_id)
            return load(model_id, *args, **kwargs)

        model.load_adapter = load_adapter

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Optimizer and number of steps are known."""
        settings = dict(self._settings)
        if state.global_step > 0:
            settings["start"] = None
        self.controller = RankController(model, optimizer, total_steps=state.max_steps, **settings)
        if state.global_step > 0:
            self.controller.load_state_dict(self._saved_state(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped and gradients are zero."""
        controller = self._running()
        decided = controller.n_decisions
        controller.step()
        if controller.n_decisions > decided:
            scalars = controller.scalars()
            if self.log is not None:
                self.log(scalars)
            else:
                state.log_history.append({**scalars, "step": state.global_step})

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Ranks and state go beside the checkpoint."""
        controller = self._running()
        values = controller.state_dict()  # on every process: it asks them all for their losses
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_ranks(model, folder, adapter_name=controller.adapter_name, masks=controller.masks)
        with replacing(folder / STATE_FILE) as temporary:
            torch.save(values, temporary)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing of the controller stays on the model."""
        self._running().close()

    def _running(self) -> RankController:
        if self.controller is None:
            raise ControlError("the controller must be started by `on_train_begin`; pass the callback to a Trainer.")
        return self.controller

    def _saved_state(self, step: int) -> Any:
        if self._loaded_from is None or not (path := self._loaded_from / STATE_FILE).exists():
            raise ControlError(
                f"the checkpoint of step {step} must hold {STATE_FILE} to be resumed with a controller, but does not; "
                "resume from another."
            )
        return torch.load(path, map_location="cpu", weights_only=True)
