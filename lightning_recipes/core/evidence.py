"""What trained networks predict on held-out data, as far as it is needed to choose and weight them."""

import math

import torch
from torch import Tensor, nn

from lightning_recipes.core.arguments import check_choice

TASKS = ("auto", "classification", "binary", "regression")
TOLERANCE = 1e-5  # nats, or share of the squared error, that simplex weights are off the optimum at most
ITERATIONS = 1000
LEAST = -700.0  # log of a probability over the best member's, at which it is taken to be; e**-745 is 0
BINS = 15  # of equal width, of the calibration error


class Evidence:
    """What the members predict on held-out data: of each batch as little as weights and report need.

    - Classification (members give logits): the loss is the negative log-likelihood of the weighted mean of the softmax
      probabilities. Kept are each member's log-probability of the target, 4 bytes a member and position.
    - Binary (a logit for each target): likewise, with the sigmoid.
    - Regression: the loss is the squared error of the weighted mean. Kept are the products of the members' residuals,
      summed over a sample, 8 bytes a pair of members.

    A *sample* is a row of the batch. Positions in one row (tokens, pixels) are not independent: the loss is the mean
    over positions, its noise is judged over samples. What is kept is moved to the CPU.

    Attributes:
        task: ``"classification"``, ``"binary"`` or ``"regression"``, once there was a batch.
        dim: Of the classes in one member's output, likewise.
        samples: Rows seen.

    Args:
        task: ``"auto"`` tells from the first batch: integer targets without the dimension of the classes are
            classification, floating-point targets of the outputs' shape regression, boolean ones binary.
        dim: Of the classes in one member's output; None where the shapes tell: outputs (N, C, ...) with targets
            (N, ...), outputs (N, ..., C) with targets (N, ...), outputs (N * T, C) with targets (N, T).
        ignore_index: A target that does not count, in classification.

    Example:
        >>> evidence = Evidence()
        >>> evidence.update(torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]), torch.tensor([1, 0]))
        >>> evidence.task, evidence.samples
        ('classification', 2)
        >>> [round(float(loss), 3) for loss in evidence.losses().mean(1)]
        [0.22, 0.693]
    """

    def __init__(self, task: str = "auto", dim: int | None = None, ignore_index: int = -100) -> None:
        self.task = check_choice("task", task, TASKS)
        self.dim, self.ignore_index = dim, ignore_index
        self.samples = 0
        self._kept: list[tuple[Tensor, Tensor]] = []  # log-probabilities and rows, or products and counts
        self._positions = 0
        self._correct: Tensor = torch.zeros(())  # (members,)
        self._differs: Tensor = torch.zeros(())  # (members, members): positions at which the predicted class differs
        self._bins: Tensor = torch.zeros(())  # (members, 3, bins): positions, confidence, hits

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch.

        Args:
            outputs: Of all members, shape (members, batch, ...).
            targets: Shape (batch, ...).

        Raises:
            ValueError: If the shapes do not say what the outputs mean, or the number of members changes.
        """
        members = len(outputs)
        if self._kept and members != self._kept[0][0].shape[0 if self.task != "regression" else 1]:
            raise ValueError(f"every batch must have outputs of the same members, got {members}")
        if self.task == "auto":
            self.task = _task_of(outputs, targets)
        targets = targets.to(outputs.device)
        if self.task == "classification":
            self._update_classes(outputs, targets)
        elif outputs.shape[1:] != targets.shape:
            raise ValueError(
                f"{self.task} needs a target for each output: outputs have the shape (members, batch, ...) "
                f"{tuple(outputs.shape)}, targets {tuple(targets.shape)}"
            )
        elif self.task == "binary":
            self._update_binary(outputs.reshape(members, -1).float(), targets)
        else:
            residuals = (outputs.double() - targets.double()).reshape(members, len(targets), -1)
            products = torch.einsum("irp,jrp->rij", residuals, residuals)
            counts = torch.full((len(targets),), residuals.shape[2], dtype=torch.float64)
            self._kept.append((products.cpu(), counts))
        self.samples += len(targets)

    def _update_classes(self, outputs: Tensor, targets: Tensor) -> None:
        if self.dim is None:
            self.dim = _class_dim(outputs[0], targets)
        outputs = outputs.movedim(self.dim + 1 if self.dim >= 0 else self.dim, -1)
        if outputs[0, ..., 0].numel() != targets.numel():
            raise ValueError(
                f"there must be a target for each position: outputs have the shape (members, batch, ...) "
                f"{tuple(outputs.shape)} with the classes last, targets {tuple(targets.shape)}"
            )
        flat = targets.flatten()
        counted = flat != self.ignore_index
        flat = flat[counted].long()
        log_p, confidence, tops = [], [], []
        for output in outputs:  # one after the other: in single precision those of a language model are large
            logits = output.reshape(-1, output.shape[-1])[counted].float()
            norm = logits.logsumexp(-1)
            norm = norm.masked_fill(norm.isinf(), math.nan)  # an infinite logit is no prediction
            log_p.append(logits.gather(1, flat[:, None]).squeeze(1) - norm)
            top = logits.max(-1)
            confidence.append((top.values - norm).exp())
            tops.append(top.indices)
        top_of_all = torch.stack(tops)
        correct = top_of_all == flat
        self._count(torch.stack(log_p), targets, counted, top_of_all, correct, torch.stack(confidence), correct)

    def _update_binary(self, logits: Tensor, targets: Tensor) -> None:
        logits = logits.masked_fill(logits.isinf(), math.nan)
        truth = targets.flatten().bool()
        counted = torch.ones_like(truth)
        log_p = nn.functional.logsigmoid(torch.where(truth, logits, -logits))
        top = logits > 0
        hits = truth.expand_as(top)  # calibration of binary predictions is that of the probability of 1
        self._count(log_p, targets, counted, top, top == truth, logits.sigmoid(), hits)

    def _count(
        self,
        log_p: Tensor,
        targets: Tensor,
        counted: Tensor,
        tops: Tensor,
        correct: Tensor,
        confidence: Tensor,
        hits: Tensor,
    ) -> None:
        rows = torch.arange(len(targets)).repeat_interleave(targets[0].numel() if len(targets) else 1)
        self._kept.append((log_p.cpu(), rows[counted.cpu()] + self.samples))
        self._positions += log_p.shape[1]
        self._correct = self._correct + correct.sum(1).cpu()
        self._differs = self._differs + torch.stack([(tops != top).sum(1) for top in tops]).cpu()
        # One more bin than boundaries divide, for a confidence of exactly 1, as torchmetrics has it.
        place = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1, device=confidence.device), right=True) - 1
        place = place.clamp(0, BINS)
        columns = [torch.ones_like(confidence), confidence, hits.to(confidence.dtype)]
        empty = torch.zeros(len(confidence), BINS + 1, device=confidence.device)
        self._bins = self._bins + torch.stack([empty.scatter_add(1, place, c).double() for c in columns], 1).cpu()

    def extend(self, other: "Evidence") -> None:
        """Take in the batches that another one has seen, as on another rank."""
        if not other._kept:
            return
        if self._kept and self.task != other.task:
            raise ValueError(f"evidence of one task is wanted, got {self.task} and {other.task}")
        self.task, self.dim = other.task, other.dim
        shift = self.samples if self.task != "regression" else 0  # rows are numbered, counts are not
        self._kept += [(first, second + shift) for first, second in other._kept]
        self.samples += other.samples
        self._positions += other._positions
        self._correct = self._correct + other._correct
        self._differs = self._differs + other._differs
        self._bins = self._bins + other._bins

    def table(self) -> "tuple[Table, list[int]]":
        """What the loss of any weights can be computed of, and the members in it: those whose predictions are numbers.

        Raises:
            ValueError: If there was no batch, or no member is left.
        """
        if not self._kept:
            raise ValueError("there is no evidence: no batch has been given")
        first = torch.cat([first for first, _ in self._kept], 0 if self.task == "regression" else 1)
        second = torch.cat([second for _, second in self._kept])
        if self.task == "regression":
            finite = _places(first.diagonal(dim1=1, dim2=2).isfinite().all(0))
        else:
            finite = _places(~first.isnan().any(1))
        if not finite:
            raise ValueError("every member predicts NaN or infinities")
        table: Table
        if self.task == "regression":
            table = Squares(first[:, finite][:, :, finite], second)
        else:
            table = Likelihoods(first[finite].double(), torch.unique(second, return_inverse=True)[1])
        if not len(table.counts):
            raise ValueError("there is no evidence: no target counts")
        return table, finite

    def losses(self) -> Tensor:
        """Mean loss of each sample under each member, shape (members, samples); NaN for one that gives no numbers."""
        table, finite = self.table()
        losses = torch.full((len(self.disagreements()), len(table.counts)), math.nan, dtype=torch.float64)
        for place, member in enumerate(finite):
            losses[member] = table.losses(only(table.members, place)) / table.counts
        return losses

    def accuracies(self) -> list[float]:
        """Of each member; NaN for regression."""
        return self._shares(self._correct)

    def calibration_errors(self) -> list[float]:
        """Expected calibration error of each member, over 15 bins of equal width; NaN for regression."""
        if self.task == "regression":
            return self._shares(self._correct)
        _, confidence, hits = self._bins.unbind(1)
        return self._shares((confidence - hits).abs().sum(1))

    def disagreements(self) -> Tensor:
        """Of each pair of members, shape (members, members).

        Share of the positions at which the predicted class differs. For regression: the mean squared difference over
        the sum of the mean squared errors, 0 for equal members and 1 for ones whose errors are not correlated.
        """
        if self.task != "regression":
            return self._differs.double() / self._positions
        total = torch.cat([products for products, _ in self._kept]).sum(0)
        errors = total.diagonal()[:, None] + total.diagonal()
        return torch.where(errors > 0, (errors - 2 * total) / errors, torch.where(errors == 0, 0.0, torch.nan))

    def _shares(self, counts: Tensor) -> list[float]:
        if self.task == "regression":
            return [math.nan] * self._kept[0][0].shape[1]
        return [float(count) / self._positions for count in counts]


def _task_of(outputs: Tensor, targets: Tensor) -> str:
    same = outputs.shape[1:] == targets.shape
    if targets.dtype == torch.bool and same:
        return "binary"
    if targets.is_floating_point() and same:
        return "regression"
    if not (targets.is_floating_point() or targets.dtype == torch.bool or same):
        return "classification"
    raise ValueError(
        f"outputs (members, batch, ...) of the shape {tuple(outputs.shape)} and {targets.dtype} targets of the shape "
        f"{tuple(targets.shape)} do not tell the task: give task='classification', 'binary' or 'regression', and "
        "targets that fit"
    )


def _class_dim(output: Tensor, targets: Tensor) -> int:
    """The dimension of the classes in the output of one member."""
    second = output.ndim > 1 and (output.shape[0], *output.shape[2:]) == targets.shape
    last = output.ndim > 1 and (output.shape[:-1] == targets.shape or output.shape[:-1] == (targets.numel(),))
    if second == last and not (second and output.ndim == 2):
        problem = "could have the classes second or last" if second else "do not fit"
        raise ValueError(
            f"outputs of shape {tuple(output.shape)} and targets {tuple(targets.shape)} {problem}: give dim"
        )
    return 1 if second else -1


def _places(mask: Tensor) -> list[int]:
    return [index for index, value in enumerate(mask.tolist()) if value]


# ------------------------------------------------------------------------------ the loss of any weights


class Likelihoods:
    """The loss of any weights: negative log-likelihood of the mixture.

    Log-probabilities of the targets have the shape (members, positions), ``rows`` names the sample of each position.
    """

    def __init__(self, log_p: Tensor, rows: Tensor, samples: int | None = None) -> None:
        self.members = len(log_p)
        self.log_p, self.rows = log_p, rows
        self.counts = torch.bincount(rows, minlength=samples or 0).double()
        self.best = log_p.clamp(min=-1e4).amax(0)  # every member may call the target impossible
        self.p = (log_p - self.best).clamp(min=LEAST).exp()

    def losses(self, weights: Tensor) -> Tensor:
        """Sum of the losses over the positions of each sample, shape (samples,)."""
        losses = -((weights @ self.p).log() + self.best)
        return torch.zeros_like(self.counts).index_add(0, self.rows, losses)

    def loss(self, weights: Tensor) -> float:
        """Mean over the positions."""
        return -float(((weights @ self.p).log() + self.best).mean())

    def simplex(self) -> Tensor:
        """Expectation maximisation: the gap to the optimum is below the largest ratio less 1."""
        weights = torch.full((self.members,), 1 / self.members, dtype=torch.float64)
        for _ in range(ITERATIONS):
            ratios = (self.p / (weights @ self.p)).mean(1)
            if ratios.max() - 1 < TOLERANCE:
                break
            weights = weights * ratios
        return weights / weights.sum()

    def part(self, chosen: Tensor) -> "Likelihoods":
        """The samples where ``chosen`` is true."""
        positions = chosen[self.rows]
        renumbered = (chosen.cumsum(0) - 1)[self.rows[positions]]
        return Likelihoods(self.log_p[:, positions], renumbered, int(chosen.sum()))


class Squares:
    """The loss of any weights: squared error of the mean.

    Products of the members' residuals have the shape (samples, members, members).
    """

    def __init__(self, products: Tensor, counts: Tensor) -> None:
        self.members = products.shape[1]
        self.products, self.counts = products, counts

    def losses(self, weights: Tensor) -> Tensor:
        """Sum of the losses over the positions of each sample, shape (samples,)."""
        return (self.products @ weights) @ weights

    def loss(self, weights: Tensor) -> float:
        """Mean over the positions."""
        return float(self.losses(weights).sum() / self.counts.sum())

    def simplex(self) -> Tensor:
        """Pairwise Frank-Wolfe: move weight from the worst member that has any to the best, as far as it helps."""
        total = self.products.sum(0) / self.counts.sum()
        weights = torch.full((self.members,), 1 / self.members, dtype=torch.float64)
        for _ in range(ITERATIONS):
            slope = total @ weights
            to, source = int(slope.argmin()), int(slope.masked_fill(weights == 0, -math.inf).argmax())
            gap = slope[source] - slope[to]
            if gap <= TOLERANCE * (weights @ slope):
                break
            curvature = total[to, to] + total[source, source] - 2 * total[to, source]
            step = weights[source].clamp(max=gap / curvature)
            weights[to] += step
            weights[source] -= step
        return weights

    def part(self, chosen: Tensor) -> "Squares":
        """Likewise."""
        return Squares(self.products[chosen], self.counts[chosen])


Table = Likelihoods | Squares


def only(members: int, member: int) -> Tensor:
    """Weights that are those of one member."""
    return nn.functional.one_hot(torch.tensor(member), members).double()
