"""The loss as a function of all parameters, its Hessian by products with vectors, and the steps of the optimizers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

NEGATIVE = 1e-3  # of the largest curvature: what a negative one has to exceed, or it is next to nothing
ROOM = 2**29  # bytes of what is kept to be quicker: vectors of a spectrum, graphs of the first derivatives
SURE = 0.05  # risk that the bound below the smallest eigenvalue does not hold


# ---------------------------------------------------------------------------------- the ends of a spectrum


@dataclass(frozen=True)
class Spectrum:
    """The two ends of a symmetric matrix' spectrum, as far as products with vectors show them.

    Args:
        smallest: Rayleigh quotient of ``direction``: the smallest eigenvalue is this or below.
        smallest_error: An eigenvalue is this near to it.
        largest: Likewise: the largest eigenvalue is this or above.
        largest_error: An eigenvalue is this near to it.
        floor: No eigenvalue is below, with a probability of 95 % over the random start.
        direction: Unit vector of the curvature ``smallest``.
        products: Matrix-vector products it took.
        asymmetry: How far the matrix was from symmetric, over its largest absolute eigenvalue; more than rounding is an
            error in the products.
    """

    smallest: float
    smallest_error: float
    largest: float
    largest_error: float
    floor: float
    direction: Tensor
    products: int
    asymmetry: float

    @property
    def scale(self) -> float:
        """The largest absolute eigenvalue."""
        return max(abs(self.smallest), abs(self.largest))


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    max_products: int = 150,
    tolerance: float = 0.003,
    ends: Literal["both", "largest"] = "both",
) -> Spectrum:
    """Lanczos' method with full re-orthogonalisation.

    Stops when both ends are within ``tolerance`` of an eigenvalue (the smallest relative to itself or to a hundredth of
    the largest), when the vectors span an invariant subspace, whose eigenvalues are exact and by a random start those
    of the whole matrix, or after ``max_products``. Keeps that many vectors of the length of ``start``, if they fit into
    :data:`ROOM`, or as many as do, but no less than 30.

    The residual bounds say how near *an* eigenvalue is, never that no other lies outside; hence a tolerance below what
    is wanted: with 0.003 both ends of small networks' Hessians were never off by more than 1 %. How far outside
    another may lie is bounded with a probability over random starts: after k products the error is above a share e of
    the width of the spectrum with a probability of at most ``2 * 1.648 sqrt(n) exp(-sqrt(e) (2 k - 1))``. The 2 is for
    what may have been added to the random vector.

    Args:
        product: Multiplies a vector with the matrix.
        start: A random vector, evenly distributed over all directions, plus any that is not longer.
        max_products: At least 1.
        tolerance: Relative.
        ends: Which have to be found before it stops.

    Raises:
        ArithmeticError: If a product is not finite.

    Example:
        >>> matrix = torch.diag(torch.tensor([-1.0, 0.0, 2.0, 10.0]))
        >>> spectrum = extreme_eigenvalues(lambda vector: matrix @ vector, torch.ones(4))
        >>> round(spectrum.smallest, 3), round(spectrum.largest, 3), spectrum.products
        (-1.0, 10.0, 4)

    References:
        Golub and Van Loan, Matrix Computations, chapter 10
        Kuczynski and Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
        start, 1992: https://doi.org/10.1137/0613066
    """
    size = start.numel()
    limit = min(max_products, size, max(30, ROOM // (size * start.element_size())))
    basis = start.new_empty(limit, size)
    basis[0] = start / torch.linalg.vector_norm(start)
    diagonal: list[float] = []
    beside: list[float] = []
    outside = 0.0  # what a symmetric matrix would have as 0
    check = 1  # products after which to see whether they do
    while True:
        used = len(diagonal) + 1
        image = product(basis[used - 1])
        inner = basis[:used] @ image
        along = inner.tolist()
        if not all(map(math.isfinite, along)):
            raise ArithmeticError("a product with the Hessian is not finite")
        diagonal.append(along[-1])
        expected = [0.0] * len(beside[:-1]) + beside[-1:]
        outside = max([outside, *(abs(a - b) for a, b in zip(along[:-1], expected, strict=True))])
        for _ in range(2):  # twice is enough
            image = image - inner @ basis[:used]
            inner = basis[:used] @ image
        left = float(torch.linalg.vector_norm(image))
        span = max(map(abs, (*diagonal, *beside)))  # as the largest absolute eigenvalue, up to a factor of 3
        exhausted = used == size or left <= 10 * torch.finfo(image.dtype).eps * span
        if exhausted or used >= min(check, limit):
            check = used + max(1, used // 10)
            values, vectors = _eigenvalues_of(diagonal, beside)
            scale = float(values.abs().max())
            low, high = (0.0 if exhausted else left * abs(float(vectors[-1, end])) for end in (0, -1))
            found = high <= tolerance * abs(float(values[-1]))
            if ends == "both":
                found = found and low <= tolerance * max(abs(float(values[0])), scale / 100)
            if found or exhausted or used == limit:
                break
        beside.append(left)
        basis[used] = image / left
    return Spectrum(
        smallest=float(values[0]),
        smallest_error=low,
        largest=float(values[-1]),
        largest_error=high,
        floor=float(values[0]) if exhausted else _floor(values, size, used),
        direction=vectors[:, 0].to(basis) @ basis[:used],
        products=used,
        asymmetry=outside / scale if scale else 0.0,
    )


def _eigenvalues_of(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Of a tridiagonal symmetric matrix, with its eigenvectors."""
    off = torch.tensor(beside, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _floor(values: Tensor, size: int, products: int) -> float:
    risk = math.log(2 * 1.648 * math.sqrt(size) / (SURE / 2))  # half of it for each end, which the width is made of
    error = (risk / (2 * products - 1)) ** 2
    width = float(values[-1] - values[0])
    return float(values[0]) - error * width / (1 - 2 * error) if error < 0.5 else -math.inf


# ---------------------------------------------------------------------------------- the loss and its derivatives


class LossSurface:
    """The mean of the losses of some batches, as a function of parameters that are put into one vector.

    :meth:`gradients` keeps the graphs of all first derivatives if what they have saved fits into :data:`ROOM` on every
    rank; products are then one backward pass through them, until :meth:`loss_at` is asked for. If it does not fit, or
    a graph cannot be gone through again, every product computes each loss anew: the memory is that of one batch,
    differentiated twice.

    Attributes:
        products: Hessian-vector products so far.
        work: All so far, in gradients of a batch: 2 for a product with a graph that was kept, 3 with one that was not.
        failure: What went wrong in the last derivative, if anything did; its values are then NaN.

    Args:
        losses: Each computes the loss of one batch.
        parameters: What they are computed from; leaves that require gradients. Never changed but in :meth:`loss_at`,
            which puts them back bit for bit.
        mean: The mean of a tensor over the ranks of a training, all of which have to ask for the same, in order.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> surface = LossSurface([lambda: (weight**2).sum(), lambda: 2 * weight[0] ** 2], [weight])
        >>> surface.product(torch.ones(2))
        tensor([3., 1.])
    """

    def __init__(
        self,
        losses: Sequence[Callable[[], Tensor]],
        parameters: Iterable[Tensor],
        mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.losses, self.parameters, self.mean = losses, list(parameters), mean
        self.penalty: Tensor | None = None  # c of the term c/2 weight^2 that weight decay adds
        self.products = self.work = 0
        self.failure: Exception | None = None
        self._room = ROOM
        self._kept: list[Tensor] = []  # first derivatives, of all batches

    @property
    def weights(self) -> Tensor:
        """A copy of all parameters as one vector."""
        return _flat(self.parameters).clone()

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        """The losses of this rank's batches and their gradients, without what weight decay adds."""
        self.work += len(self.losses)
        self._kept = []
        saved: dict[int, int] = {}  # bytes by storage
        pairs = [self._tried(partial(self._gradient, loss, saved)) for loss in self.losses]
        fits = bool(self._kept) and sum(saved.values()) <= self._room
        if float(self.mean(pairs[0][0].new_tensor(float(fits)))) < 1:  # or ranks would go different ways
            self._kept = []
        return torch.stack([value for value, _ in pairs]), [gradient for _, gradient in pairs]

    def product(self, vector: Tensor) -> Tensor:
        """The Hessian times a vector."""
        self.products += 1
        self.work += (2 if self._kept else 3) * len(self.losses)
        total = self._tried(partial(self._product, vector))[1]
        total = self.mean(total / len(self.losses)).to(vector)
        return total if self.penalty is None else total + self.penalty * vector

    def _gradient(self, loss: Callable[[], Tensor], saved: dict[int, int]) -> tuple[Tensor, Tensor]:
        if sum(saved.values()) > self._room or not self._room:
            self._kept = []
            value = loss()
            return value.detach(), _flat(_derivatives(value, self.parameters))

        def count(tensor: Tensor) -> tuple[Tensor, int]:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor, tensor._version

        with torch.autograd.graph.saved_tensors_hooks(count, _unchanged):
            value = loss()
            gradient = _derivatives(value, self.parameters, create_graph=True)
        self._kept += gradient
        return value.detach(), _flat(gradient)

    def _product(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        if self._kept:
            return vector, self._along(vector, self._kept, keep=True)
        total = torch.zeros_like(vector)
        for loss in self.losses:
            total += self._along(vector, _derivatives(loss(), self.parameters, create_graph=True))
        return vector, total

    def _along(self, vector: Tensor, gradients: Sequence[Tensor], keep: bool = False) -> Tensor:
        pairs = zip(gradients, cycle(self._pieces(vector)), strict=False)
        bent = [(each, piece.to(each)) for each, piece in pairs if each.requires_grad]
        if not bent:
            return torch.zeros_like(vector)  # linear in all of them
        outputs, pieces = zip(*bent, strict=True)
        return _flat(_derivatives(outputs, self.parameters, pieces, retain_graph=keep)).to(vector)

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        pieces = torch.split(vector, [parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def custom_functions(self) -> list[str]:
        """Names of the ``torch.autograd.Function`` that the first loss is computed with."""
        names: set[str] = set()
        seen: set[Any] = set()
        left: list[Any] = [self.losses[0]().grad_fn]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                left += [before for before, _ in node.next_functions]
                if isinstance(node, torch.autograd.function.BackwardCFunction):
                    names.add(type(node).__name__.removesuffix("Backward"))
        return sorted(names)

    def _tried(self, derive: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """NaN where a derivative fails: the other ranks have to learn of it, and wait for its values."""
        while self.failure is None:
            try:
                return derive()
            except Exception as error:  # an operation without second derivative, out of memory, or no loss
                if not self._room:
                    self.failure = error
                self._room, self._kept = 0, []  # it may be for what was kept
        weights = self.weights
        return weights.new_full((), math.nan), torch.full_like(weights, math.nan)

    @torch.no_grad()
    def loss_at(self, step: Tensor) -> float:
        """The loss, with what weight decay adds, a step away."""
        self.work += len(self.losses)
        self._kept = []  # of weights that are about to change
        before = [parameter.clone() for parameter in self.parameters]
        try:
            for parameter, piece in zip(self.parameters, self._pieces(step), strict=True):
                parameter += piece.to(parameter)
            with torch.enable_grad():  # or attention takes another path, with other rounding
                values = torch.stack([loss().detach() for loss in self.losses])
            mean = float(self.mean(values.double().mean()))
            return mean if self.penalty is None else mean + float(self.penalty @ self.weights.square()) / 2
        finally:
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.copy_(value)


def _derivatives(outputs: Any, parameters: list[Tensor], along: Any = None, **settings: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, parameters, along, allow_unused=True, materialize_grads=True, **settings)


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError("what was kept for a derivative has been changed in place")
    return tensor


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    pieces = [tensor.detach().reshape(-1) for tensor in tensors]
    return torch.cat([piece.to(pieces[0]) for piece in pieces])


@dataclass(frozen=True)
class Steps:
    """What an optimizer makes of a gradient, entry by entry: its preconditioner now, times the learning rate.

    Args:
        sharpness_limit: Learning rate times preconditioner over the limit of stability: a curvature of 1 in this metric
            is the edge.
        reach: Learning rate times preconditioner, summed over all updates that a gradient takes part in by momentum.
        penalty: c of the term ``c/2 weight^2`` that weight decay adds to the loss.
    """

    sharpness_limit: Tensor
    reach: Tensor
    penalty: Tensor

    @property
    def is_uniform(self) -> bool:
        """Whether all entries are treated alike."""
        return bool((self.sharpness_limit == self.sharpness_limit[0]).all())


def steps_of(optimizers: Iterable[Optimizer], parameters: Sequence[Tensor]) -> Steps | None:
    """The steps of SGD (with momentum, Nesterov's too), RMSprop, Adam and AdamW; None of any other.

    A quadratic of curvature h is left by gradient descent if ``rate h > 2``; with momentum b, 2 (1 + b), with
    Nesterov's 2 (1 + b) / (1 + 2 b), with Adam's 2 (1 + b) / (1 - b), h being preconditioned. Decoupled weight decay
    pulls as a penalty would that is divided by the preconditioner.

    Args:
        optimizers: Of the training.
        parameters: Those of the optimizers that are wanted, in order.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> steps_of([torch.optim.SGD([weight], lr=0.1, momentum=0.9)], [weight]).sharpness_limit
        tensor([0.0263])

    References:
        Cohen et al., Adaptive Gradient Methods at the Edge of Stability, 2022: https://arxiv.org/abs/2207.14484
    """
    groups = {
        id(parameter): (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for parameter in parameters:
        optimizer, group = groups[id(parameter)]
        scale = _preconditioner(optimizer, group, parameter)
        if scale is None or group.get("maximize"):
            return None
        rate, decay = float(group["lr"]), float(group.get("weight_decay", 0))
        limit, reach = _momentum(optimizer, group)
        decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay")
        penalty = decay / scale.clamp_min(1e-30) if decoupled else torch.full_like(scale, decay)
        found.append((scale * (rate / limit), scale * (rate * reach), penalty * (scale > 0)))
    return Steps(*(_flat(each) for each in zip(*found, strict=True)))


def _preconditioner(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Tensor | None:
    one = torch.ones_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, SGD):
        return one
    if isinstance(optimizer, Adam | AdamW):
        if "exp_avg_sq" not in state:
            return torch.zeros_like(one)  # never moved
        squares = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (
            1 - float(group["betas"][1]) ** float(state["step"])
        )
    elif isinstance(optimizer, RMSprop):
        if "square_avg" not in state:
            return torch.zeros_like(one)
        squares = state["square_avg"] - (state["grad_avg"].square() if group["centered"] else 0)
    else:
        return None
    scale: Tensor = one / (squares.to(one).clamp_min(0).sqrt() + group["eps"])
    return scale


def _momentum(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[float, float]:
    """The limit of stability, and over how many updates a gradient is used in all."""
    if isinstance(optimizer, Adam | AdamW):
        beta = float(group["betas"][0])
        return 2 * (1 + beta) / (1 - beta), 1.0
    beta, used = float(group["momentum"]), 1 - float(group.get("dampening", 0))
    limit = 2 * (1 + beta) / (1 + 2 * beta) if group.get("nesterov") else 2 * (1 + beta)
    return limit / used, used / (1 - beta)
