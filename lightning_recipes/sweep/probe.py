"""Does an instability hide right behind the learning rate in use? A short training at twice that rate tells."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_recipes.callbacks.instability import InstabilityDetector
from lightning_recipes.callbacks.learning_rates import scale_learning_rates
from lightning_recipes.callbacks.trials import copy_of, given_callbacks, quiet, unmade_folder
from lightning_recipes.callbacks.unchanged import isolate_rng
from lightning_recipes.core.arguments import check_count, check_real
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.instability import Instability
from lightning_recipes.sweep.running import refuse_unknown

PLAYBOOK = "Deep Learning Tuning Playbook, unstable workloads: https://github.com/google-research/tuning_playbook"


@dataclass(frozen=True)
class EarlyInstability:
    """What a probe saw.

    Args:
        found: What was noticed, in order; empty if the training was stable.
        losses: Training loss of every step.
        learning_rate: The highest that was used.
        finding: The same in words, with what to do.
    """

    found: list[Instability]
    losses: list[float]
    learning_rate: float
    finding: Finding

    @property
    def hides(self) -> bool:
        """Whether an instability hides there."""
        return bool(self.found)


def early_instability_probe(
    module: pl.LightningModule,
    train_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    factor: float = 2.0,
    steps: int = 500,
    **trainer_settings: Any,
) -> EarlyInstability:
    """Train a copy for some steps at a multiple of its learning rate, look at every step, and say what was seen.

    An early instability from which a training recovers, slowed down, is missed where the loss is looked at every now
    and then: here every step is read back. The module, its data module, the random states and the folder of the run
    are left as they are.

    Args:
        module: Not trained yet, or wherever the training is to start from.
        train_dataloaders: As for ``Trainer.fit``; None for those of the data module or of the module.
        datamodule: As for ``Trainer.fit``.
        factor: Times the learning rates that the module's optimizers and schedules ask for, above 0. The playbook says
            2, and 5 or 10 for a second look.
        steps: Updates, at least 1; the playbook says about 500.
        trainer_settings: More arguments of the Trainer: ``accelerator``, ``precision``, ``accumulate_grad_batches``...
            Of ``callbacks`` the training has copies: give those that the gradients go through.

    Raises:
        TypeError: If an argument is not of its kind, or one that a Trainer does not have.
        ValueError: If it is out of its range.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> probe = early_instability_probe(BoringModel(), steps=40, accelerator="cpu")
        >>> probe.hides, probe.found[0].kind
        (True, 'early instability')

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """
    check_real("factor", factor, 0, float("inf"))
    check_count("steps", steps, 1)
    refuse_unknown(early_instability_probe, trainer_settings)
    watch = _Watch(factor)
    with isolate_rng(), quiet(), unmade_folder() as folder:
        trainer = pl.Trainer(
            **{
                "max_steps": steps,
                "max_epochs": -1,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
                **trainer_settings,
                "callbacks": [watch, *given_callbacks(trainer_settings), _Judge(watch)],
            }
        )
        trainer.fit(copy_of(module), train_dataloaders, datamodule=copy.copy(datamodule))
    return EarlyInstability(watch.found, watch.losses, watch.highest_rate, _finding(watch, factor, steps))


class _Watch(pl.Callback):
    """Raise the learning rates, and write down every step."""

    def __init__(self, factor: float) -> None:
        self.factor, self.highest_rate = factor, 0.0
        self.losses: list[float] = []
        self.found: list[Instability] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scale_learning_rates(trainer, self.factor)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(float(loss) * trainer.accumulate_grad_batches)
        rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.highest_rate = max(self.highest_rate, *rates)


class _Judge(InstabilityDetector):
    """Keep what is noticed instead of telling it."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    @override
    def _act(self, trainer: Any, pl_module: Any, optimizer: Any, update: Any, found: Instability) -> None:
        self.watch.found.append(found)


def _finding(watch: _Watch, factor: float, steps: int) -> Finding:
    evidence: dict[str, float | str] = {"factor": factor, "steps": steps, "learning_rate": watch.highest_rate}
    where = f"{factor:g} times the learning rate (up to {watch.highest_rate:.3g})"
    if not watch.found:
        return Finding(
            rule="no early instability",
            severity="info",
            message=f"{len(watch.losses)} steps at {where} were stable.",
            advice="A higher learning rate may be tried; look again at 5 and 10 times the rate that you settle on.",
            step=len(watch.losses),
            evidence=evidence,
            source=PLAYBOOK,
        )
    first = watch.found[0]
    return Finding(
        rule="early instability",
        severity="warning",
        message=f"At {where} the training became unstable at step {first.step}: {first.kind}, with a {first.signal} of"
        f" {first.value:.3g}.",
        advice="A warmup, or gradient clipping, should allow a higher learning rate and a better model.",
        step=first.step,
        evidence={**evidence, "kind": first.kind, "value": first.value, "expected": first.expected},
        source=PLAYBOOK,
    )
