"""Judge trained networks of one architecture on held-out data, and let those that help predict together."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_recipes.core.ensembles import COMBINATIONS, Combination, Ensemble, average_weights
from lightning_recipes.core.evidence import Evidence
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.selection import Report, paired, quantile, report, select
from lightning_recipes.core.soups import barrier

Split = Callable[[Any], tuple[Any, Tensor]]
State = Mapping[str, Tensor]

COMBINES = ("auto", *COMBINATIONS)
NEGLIGIBLE = 0.03  # of the loss
BY_TASK = {"classification": "logits", "binary": "binary logits", "regression": "mean"}


@dataclass(frozen=True)
class HeldOut:
    """Held-out data, and how networks are asked about it.

    Args:
        batches: Gives the batches anew at each call, always in the same order, on the device of the networks.
        split: Makes inputs and targets of a batch.
        gather: Gives what every process has seen, in the same order on each of them.
        probabilities: Whether the networks give probabilities, not logits.
        context: That networks are asked in.
    """

    batches: Callable[[], Iterable[Any]]
    split: Split
    gather: Callable[[Evidence], Iterable[Evidence]] = lambda evidence: (evidence,)
    probabilities: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def predictions(self, predict: Callable[[Any], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """What ``predict`` gives for each batch, and the targets."""
        for batch in self.batches():
            inputs, targets = self.split(batch)
            with torch.no_grad(), self.context():
                outputs = predict(inputs)
            yield outputs, targets

    def evidence(self, predict: Callable[[Any], Tensor], like: Evidence | None = None) -> Evidence:
        """What networks predict on all of it.

        Args:
            predict: Given inputs, what each network gives, shape (networks, ...).
            like: Evidence whose task was found out.
        """
        own, whole = Evidence() if like is None else Evidence(like.task, like.dim), Evidence()
        for outputs, targets in self.predictions(predict):
            if self.probabilities and not targets.is_floating_point():
                outputs = outputs.logit() if outputs.shape[1:] == targets.shape else outputs.log()
            own.update(outputs, targets)
        for each in self.gather(own):
            whole.extend(each)
        return whole


def pair(batch: Any) -> tuple[Any, Tensor]:
    """A batch that is a pair of inputs and targets.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise TypeError(
        f"a batch must be a pair of inputs and targets, got {type(batch).__name__}: give split_batch, a function that"
        " makes a pair of one"
    )


def held_out(trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split, probabilities: bool) -> HeldOut | None:
    """The validation data of a fit as its networks see them in a validation; None if there are none.

    Args:
        trainer: Of the fit.
        pl_module: What it trains.
        split: Makes inputs and targets of a batch.
        probabilities: Whether the networks give probabilities, not logits.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation:
        with _validating(trainer):
            loop.setup_data()
    combined = loop._combined_loader
    if combined is None or not sum(loop.max_batches):
        return None
    loaders = list(zip(combined.flattened, loop.max_batches, strict=True))

    def batches() -> Iterator[Any]:
        for index, (loader, most) in enumerate(loaders):
            for batch in islice(loader, None if most == math.inf else int(most)):
                with _validating(trainer):
                    batch = trainer.precision_plugin.convert_input(batch)
                    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=index)
                    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=index)
                yield batch

    def gather(evidence: Evidence) -> list[Evidence]:
        every: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, evidence)
        return every

    return HeldOut(
        batches,
        split,
        gather if trainer.world_size > 1 else HeldOut.gather,
        probabilities,
        trainer.precision_plugin.val_step_context,
    )


@contextmanager
def _validating(trainer: pl.Trainer) -> Iterator[None]:
    """What a module or a data module asks before it augments a batch."""
    stage, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def with_state(module: nn.Module, state: State) -> nn.Module:
    """A copy of the module, without its Trainer, that has this state and is not trained.

    What the module keeps of a forward pass, such as an activation, has no gradient in the copy: torch copies no others.
    """
    trainer = getattr(module, "_trainer", None)
    copies: dict[int, Any] = {} if trainer is None else {id(trainer): None}
    kept = (each for submodule in module.modules() for each in tree_leaves(vars(submodule)))
    copies |= {id(each): each.detach().clone() for each in kept if isinstance(each, Tensor) and not each.is_leaf}
    own = copy.deepcopy(module, copies)
    own.load_state_dict(dict(state))
    return own.requires_grad_(False).eval()


def judge(
    members: Sequence[nn.Module],
    data: HeldOut,
    how: str = "auto",
    combine: str | Combination = "auto",
    names: Sequence[str] | None = None,
    step: int = 0,
) -> tuple[Ensemble, Report]:
    """Weigh networks by what they predict on held-out data.

    Args:
        members: The networks.
        data: The data.
        how: See :func:`~lightning_recipes.core.selection.select`.
        combine: See :class:`~lightning_recipes.core.ensembles.Ensemble`; ``"auto"`` by the targets: integers mean that
            the networks give logits of classes, booleans a logit for each, floating-point numbers the same.
        names: Of the networks.
        step: Optimizer updates done.

    Returns:
        The ensemble, and what it is worth.
    """
    evidence = data.evidence(Ensemble(members).outputs)
    selection = select(evidence, how)
    combination = BY_TASK[evidence.task] if combine == "auto" else combine
    ensemble = Ensemble(members, selection.weights, combination, evidence.dim)
    alone = len(ensemble.members) == 1
    whole = None if alone else data.evidence(lambda inputs: ensemble(inputs)[None], evidence)
    return ensemble, report(evidence, selection, whole, names, step)


def can_average(
    module: nn.Module, states: Sequence[State], ensemble: Ensemble, data: HeldOut, step: int = 0
) -> Finding:
    """Whether averaging the weights of networks is as good as averaging their predictions: the barrier between them.

    Args:
        module: Of their architecture.
        states: Of at least two networks that followed each other in one training; the last two are probed.
        ensemble: That predicts with them.
        data: Held-out data.
        step: Optimizer updates done.
    """

    def losses_of(state: State) -> Tensor:
        own = with_state(module, state)
        return data.evidence(lambda inputs: own(inputs)[None]).losses()[0]

    between = barrier(losses_of, states[-2], states[-1], points=1)
    together = data.evidence(lambda inputs: ensemble(inputs)[None]).losses()[0]
    averaged = losses_of(average_weights(states))
    worse, error = paired(averaged - together, torch.ones_like(together))
    error *= quantile(len(together))
    above = "below" if between.height < 0 else "above"
    measured = (
        f"Halfway between the last two snapshots the loss is {abs(between.height):.3g} ± {between.error:.2g} {above}"
        f" the line; the average of all weights has a loss of {float(averaged.mean()):.4g}, the ensemble"
        f" {float(together.mean()):.4g}."
    )
    if worse + error <= NEGLIGIBLE * abs(float(together.mean())):
        rule = "weights can be averaged"
        advice = "Use the average of the weights (core.ensembles.average_weights): one network instead of several."
    elif worse > error:
        rule = "weights cannot be averaged"
        advice = "Average predictions, not weights." if len(ensemble.members) > 1 else "Use the best snapshot."
    else:
        rule = "weights can perhaps be averaged"
        advice = "Take more held-out samples to tell whether one network will do instead of several."
    evidence: dict[str, float | str] = {
        "barrier": between.height,
        "barrier_error": between.error,
        "averaged_loss": float(averaged.mean()),
        "ensemble_loss": float(together.mean()),
    }
    source = "Frankle et al. 2020, https://arxiv.org/abs/1912.05671"
    return Finding(rule, "info", measured, advice, step, evidence, source)


def rounding(networks: Sequence[nn.Module], data: HeldOut) -> float:
    """The largest difference of a probability that two networks predict; 0 for regression."""
    evidence, largest = data.evidence(Ensemble(networks).outputs), 0.0
    for outputs, _ in data.predictions(Ensemble(networks).outputs):
        if evidence.task == "classification" and not data.probabilities:
            assert evidence.dim is not None  # found out from the first batch
            outputs = outputs.float().softmax(evidence.dim + 1 if evidence.dim >= 0 else evidence.dim)
        elif evidence.task == "binary" and not data.probabilities:
            outputs = outputs.float().sigmoid()
        elif evidence.task == "regression":
            break
        largest = max(largest, float((outputs[0] - outputs[1]).abs().max()))
    return largest
