"""Compare the loss before the first update with what it should be."""

from collections.abc import Callable
from functools import wraps
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_recipes.callbacks.rehearsal import first_batches, is_fresh, refuse_shards, rehearse, unharmed
from lightning_recipes.callbacks.substitute import substitute
from lightning_recipes.callbacks.telling import log_scalars, tell
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_count, check_real
from lightning_recipes.core.criteria import Criterion, Watch, loss_of
from lightning_recipes.core.initial_loss import InitialLoss, InitialLossRule


class InitialLossCheck(pl.Callback):
    """Compare the loss before the first update with what it should be: a wrong one has a cause, which is named.

    Before training starts, the first batches go through the module's own ``training_step``, in a copy, with gradients
    and without updates. The loss functions of ``torch.nn.functional`` that it calls are noted with what they are given,
    and judged by :class:`~lightning_recipes.core.initial_loss.InitialLossRule`: what equal logits or the class prior
    would give, whether a softmax is applied twice, a sum or the negative returned, inputs not normalised. What the step
    returns beyond them, penalties on the weights, is reported apart. What is noticed is told as findings; only what
    is surely wrong is a warning.

    The training that follows is bit for bit the one without this callback. The check is skipped on resume, with
    ``fast_dev_run``, and where data can be read only once. Costs a copy of the module and these batches while it runs.

    Logged once: ``initial_loss`` and ``initial_loss_expected``, of the first criterion.

    Attributes:
        rule: The :class:`~lightning_recipes.core.initial_loss.InitialLossRule` of the last check.
        results: An :class:`~lightning_recipes.core.initial_loss.InitialLoss` for each criterion.

    Args:
        expected_loss: What the training step should return: a number, or a function of module and batch; None for what
            follows from its criteria.
        batches: How many batches, at least 2, for the confidence interval.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range.
        MisconfigurationException: When fit starts, of a model in shards or under DeepSpeed.

    Example:
        >>> trainer = pl.Trainer(callbacks=[InitialLossCheck()], logger=False)

    References:
        Karpathy, A recipe for training neural networks, 2019: http://karpathy.github.io/2019/04/25/recipe/
    """

    def __init__(
        self,
        expected_loss: float | Callable[[pl.LightningModule, Any], float] | None = None,
        batches: int = 10,
    ) -> None:
        if expected_loss is not None and not callable(expected_loss):
            expected_loss = check_real("expected_loss", expected_loss, float("-inf"), float("inf"))
        self.expected_loss = expected_loss
        self.batches = check_count("batches", batches, 2)
        self._forget()

    def _forget(self) -> None:
        """Start anew."""
        self.rule = InitialLossRule()
        self.results: list[InitialLoss] = []
        self._measured: dict[str, float] = {}
        self._done = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step == 0:
            self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_shards(type(self).__name__, trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_fresh(trainer) and not self._done:
            with unharmed(trainer, type(self).__name__):
                self._check(trainer, pl_module)
        self._done = True

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with first_batches(trainer, pl_module) as loaded:
            batches = list(islice(loaded, self.batches))
        if not batches:
            return
        expected = self.expected_loss
        self.rule = InitialLossRule(
            None if callable(expected) else expected, all(map(_is_adaptive, trainer.optimizers))
        )
        watch = _NoUpdates()

        def look(module: pl.LightningModule) -> None:
            step = module.training_step

            @wraps(step)
            def watched(batch: Any, *args: Any, **kwargs: Any) -> Any:
                own = expected(module, batch) if callable(expected) else None
                with Watch() as seen:
                    output = step(batch, *args, **kwargs)
                loss = loss_of(output)
                criteria = seen.part_of(loss)
                self.rule.update(loss, criteria, _inputs(batch, criteria), own)
                if loss is None or loss.requires_grad:
                    return output
                return loss.detach().requires_grad_()  # nothing is trained, which is another check's to say

            module.training_step = watched  # type: ignore[method-assign]  # and back again

        rehearse(trainer, pl_module, batches, 1, watch, look)
        self.results = self.rule.results()
        for finding in self.rule.findings():
            tell(trainer, finding)
        if self.results:
            first = self.results[0]
            self._measured = {"initial_loss": first.loss, "initial_loss_expected": first.uniform}
            log_scalars(trainer, self._measured)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done, "measured": dict(self._measured)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done, self._measured = state_dict["done"], dict(state_dict["measured"])


class _NoUpdates(pl.Callback):
    """Keeps optimizers from updating anything."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            substitute(optimizer, "step", _only_compute)


def _is_adaptive(optimizer: Optimizer) -> bool:
    """Whether the scale of the gradients does not matter to an optimizer, by the names of its arguments."""
    return all({"eps", "betas", "etas"} & {*group} for group in optimizer.param_groups)


def _only_compute(closure: Callable[[], Any] | None = None, **_: object) -> Any:
    return None if closure is None else closure()


def _inputs(batch: Any, criteria: list[Criterion]) -> list[Tensor]:
    """Tensors of a batch that no criterion has as its targets."""
    targets = {call.targets.untyped_storage().data_ptr() for call in criteria}
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    return [leaf for leaf in leaves if leaf.dim() > 1 and leaf.untyped_storage().data_ptr() not in targets]
