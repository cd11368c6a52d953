"""Our tuners inside Hugging Face's `Trainer`."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparing.tuners import Tuner


class TunerCallback(TrainerCallback):
    """Calls a tuner's `before_step` and `after_step`, which some methods need (SaRA).

    Methods without such hooks need no callback.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tuner in _tuners(kwargs["model"]):
            tuner.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tuner in _tuners(kwargs["model"]):
            tuner.after_step(state.global_step + 1, state.max_steps, kwargs["optimizer"])


def _tuners(model: Any) -> list[Tuner]:
    return [module for module in model.modules() if isinstance(module, Tuner)]
