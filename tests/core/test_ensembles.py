import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_recipes.core import ensembles
from lightning_recipes.core.ensembles import Ensemble, _Stacked, average_weights, combined, normalized

INPUTS = torch.linspace(-1, 1, 6 * 8).view(6, 8)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )


def several(make: Callable[[], nn.Module] = mlp, members: int = 5) -> list[nn.Module]:
    nets = []
    for seed in range(members):
        torch.manual_seed(seed)
        nets.append(make())
    return nets


def mean_probabilities(nets: list[nn.Module], weights: list[float], inputs: Tensor = INPUTS) -> Tensor:
    with torch.no_grad():
        return sum(w * net(inputs).double().softmax(-1) for w, net in zip(weights, nets))  # type: ignore[return-value]


@pytest.fixture
def vmap_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says: where vmap is possible and right it is chosen."""
    monkeypatch.setattr(ensembles, "CLEARLY", float("inf"))


def predicted(ensemble: Ensemble, inputs: Tensor = INPUTS) -> Tensor:
    """The second prediction: the first one is the loop's."""
    with torch.inference_mode():
        ensemble(inputs)
        return ensemble(inputs)


def uses_vmap(ensemble: Ensemble) -> bool:
    return ensemble._stacked is not None and any(ensemble._vmap_wins.values())


# ------------------------------------------------------------------------------ what is combined, and how


@pytest.mark.parametrize("weights", [[0.2] * 5, [0.5, 0.0, 0.2, 0.3, 0.0]])
def test_the_softmax_is_the_weighted_mean_of_the_softmaxes(weights: list[float]) -> None:
    nets = several()
    logits = Ensemble(nets, weights)(INPUTS)
    expected = mean_probabilities(nets, weights)
    torch.testing.assert_close(logits.softmax(-1).double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(6), rtol=0, atol=1e-6)
    loss = nn.functional.cross_entropy(logits, torch.arange(6) % 3)
    assert loss.item() == pytest.approx(-expected[torch.arange(6), torch.arange(6) % 3].log().mean().item(), rel=1e-5)


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    outputs = torch.tensor([[[0.0, -500.0, -3e4]], [[0.0, -700.0, 0.0]]])
    logits = combined(outputs, torch.tensor([0.5, 0.5]), "logits")
    torch.testing.assert_close(logits[0, 1].item(), -500 + torch.tensor(0.5).log().item())
    assert logits.isfinite().all()
    masked = combined(torch.tensor([[[0.0, -torch.inf]], [[1.0, -torch.inf]]]), torch.tensor([0.5, 0.5]), "logits")
    assert masked.tolist() == [[0.0, -torch.inf]]


@pytest.mark.parametrize("logit", [-300.0, -100.0, -3.0, 0.0, 3.0, 100.0, 300.0])
def test_binary_logits_are_the_logit_of_the_mean_sigmoid(logit: float) -> None:
    outputs, weights = torch.tensor([[logit], [2 * logit], [0.5 * logit]]), torch.tensor([0.5, 0.3, 0.2])
    if abs(logit) < 10:
        mean = (weights[:, None].double() * outputs.double().sigmoid()).sum(0)
        expected = (mean / (1 - mean)).log().float()
    else:  # the least sure member has all of the probability that is left
        expected = torch.tensor([0.5 * logit]) - weights[2].log() * (1 if logit > 0 else -1)
    torch.testing.assert_close(combined(outputs, weights, "binary logits"), expected)


def test_the_classes_are_where_cross_entropy_has_them_or_where_dim_says() -> None:
    torch.manual_seed(0)
    outputs, weights = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.tensor([0.25, 0.75])
    for dim in (None, 1, -1, 2):
        place = 1 if dim is None else dim
        expected = (outputs.softmax(place + 1 if place >= 0 else place) * weights.view(2, 1, 1, 1)).sum(0)
        torch.testing.assert_close(combined(outputs, weights, "logits", dim).exp(), expected)
    torch.testing.assert_close(combined(outputs[:, 0, 0], weights, "logits").exp().sum(), torch.ones(()).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("combine", ["logits", "binary logits", "mean"])
def test_half_precision_outputs_are_combined_in_single_precision(combine: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    outputs, weights = torch.randn(5, 4, 3).to(dtype), torch.full((5,), 0.2)
    result = combined(outputs, weights, combine)
    assert result.dtype == torch.float32
    assert torch.equal(result, combined(outputs.float(), weights, combine))


def test_means_and_functions_of_the_users() -> None:
    nets, weights = several(), [0.1, 0.2, 0.3, 0.4, 0.0]
    with torch.no_grad():
        mean = Ensemble(nets, weights, "mean")(INPUTS)
        expected = sum(weight * net(INPUTS) for weight, net in zip(weights, nets))
        median = Ensemble(nets, combine=lambda outputs, _: outputs.median(0).values)(INPUTS)
        torch.testing.assert_close(mean, expected)
        assert torch.equal(median, torch.stack([net(INPUTS) for net in nets]).median(0).values)


def test_members_of_weight_0_are_dropped_and_the_others_are_the_given_modules() -> None:
    nets = several(members=3)
    ensemble = Ensemble(nets, torch.tensor([0.0, 2.0, 6.0]))
    assert list(ensemble.members) == nets[1:]
    assert ensemble.weights.tolist() == [0.25, 0.75]
    assert ensemble.outputs(INPUTS).shape == (2, 6, 3)
    assert not any(net.training for net in nets[1:])


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -0.1], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [[0.5, 0.5]]]
)
def test_bad_weights_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
        Ensemble(several(members=2), weights)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble([])
    with pytest.raises(TypeError, match="members must be modules, got <function"):
        Ensemble([mlp])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="combine must be 'logits' or"):
        Ensemble([mlp()], combine="median")


@pytest.mark.usefixtures("vmap_wins")
@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_is_no_tensor_is_refused(grad: bool) -> None:
    class Pair(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return super().forward(inputs), inputs

    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="must give one tensor, got tuple: wrap"):
        Ensemble([Pair(8, 3), Pair(8, 3)])(INPUTS)


# ------------------------------------------------------------------------------ loop or vmap


@pytest.mark.usefixtures("vmap_wins")
@pytest.mark.parametrize("make", [mlp, cnn])
def test_vmap_gives_the_numbers_of_the_loop(make: Callable[[], nn.Module]) -> None:
    nets = several(make)
    expected = mean_probabilities([net.eval() for net in nets], [0.2] * 5)
    ensemble = Ensemble(nets)
    torch.testing.assert_close(predicted(ensemble).softmax(-1).double(), expected, rtol=1e-5, atol=1e-7)
    assert uses_vmap(ensemble)
    other = predicted(ensemble, INPUTS[:2])
    torch.testing.assert_close(other.softmax(-1).double(), expected[:2], rtol=1e-5, atol=1e-7)
    assert len(ensemble._vmap_wins) == 2


@pytest.mark.parametrize(("vmap_takes", "chosen"), [(0.5, True), (0.94, True), (0.96, False), (3.0, False)])
def test_vmap_is_chosen_only_if_it_is_clearly_faster(
    vmap_takes: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, disturbance = [0.0], iter([5.0, 1.0, 9.0, 1.0, 1.0] * 10)
    monkeypatch.setattr(ensembles.time, "perf_counter", lambda: now[0])

    def slow(call: Any, seconds: float) -> Any:
        def run(self: Any, inputs: Any, named: Any) -> Any:
            now[0] += seconds * next(disturbance)
            return call(self, inputs, named)

        return run

    monkeypatch.setattr(Ensemble, "_loop", slow(Ensemble._loop, 0.01))
    monkeypatch.setattr(_Stacked, "__call__", slow(_Stacked.__call__, 0.01 * vmap_takes))
    ensemble = Ensemble(several())
    predicted(ensemble)
    assert uses_vmap(ensemble) is chosen
    assert (ensemble._stacked is not None) is chosen


def test_results_that_differ_by_the_order_of_sums_alone_are_alike() -> None:
    given = torch.tensor([1.0, -3.0, math.nan, 0.5])
    assert ensembles._alike(given, given * (1 + 1e-6))
    assert not ensembles._alike(given, given + 0.01)
    assert not ensembles._alike(given, given.nan_to_num(0))
    assert not ensembles._alike(given, given.double())
    assert not ensembles._alike(given[:2], given[:1])
    zeros = torch.tensor([0.0, math.nan])
    assert not ensembles._alike(zeros, zeros + 1e-5)
    assert ensembles._alike(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert not ensembles._alike(torch.tensor([10_000, 2]), torch.tensor([10_000, 3]))


def test_a_long_call_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensembles, "LONG", -1.0)
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(inputs)

    ensemble = Ensemble([Counted(8, 3)])
    predicted(ensemble)
    assert len(calls) == 3  # the two predictions, and one that was timed


class Noise(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + torch.randn(3)


class Branching(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return outputs if outputs.sum() > 0 else -outputs


class Own(nn.Linear):
    """Has a number that is no parameter."""

    made = 0

    def __init__(self) -> None:
        super().__init__(8, 3)
        Own.made += 1
        self.temperature = Own.made

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) / self.temperature


class Counting(nn.Linear):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(inputs)


class Replacing(Counting):
    def forward(self, inputs: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return nn.Linear.forward(self, inputs)


class Numpys(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + float(self.bias.detach().numpy().sum())


def linear(kind: type[nn.Linear]) -> Callable[[], nn.Module]:
    return kind if issubclass(kind, (Own, Counting)) else lambda: kind(8, 3)


@pytest.mark.usefixtures("vmap_wins")
@pytest.mark.parametrize("kind", [Noise, Branching, Own, Counting, Replacing, Numpys])
def test_what_vmap_cannot_do_right_the_loop_does(kind: type[nn.Linear]) -> None:
    nets = several(linear(kind))
    ensemble = Ensemble(nets)
    torch.manual_seed(0)
    result = predicted(ensemble)
    assert not uses_vmap(ensemble)
    assert result.isfinite().all()
    if kind in (Counting, Replacing):
        assert [net.calls.item() for net in nets] == [2.0] * 5
    elif kind is not Noise:
        expected = mean_probabilities(nets, [0.2] * 5)
        torch.testing.assert_close(result.softmax(-1).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("vmap_wins")
def test_members_of_several_kinds_or_with_hooks_take_the_loop() -> None:
    tied = mlp()
    for nets in (
        [mlp(), cnn()],
        [nn.Linear(8, 3), nn.Linear(8, 3).double().float().to(memory_format=None)],
        [tied] * 2,
    ):
        ensemble = Ensemble(nets)
        expected = mean_probabilities(nets, [0.5, 0.5])
        torch.testing.assert_close(predicted(ensemble).softmax(-1).double(), expected, rtol=1e-5, atol=1e-7)
        assert uses_vmap(ensemble) is (type(nets[0]) is nn.Linear)
    seen: list[Tensor] = []
    nets = several(members=2)
    ensemble = Ensemble(nets)
    predicted(ensemble)
    assert uses_vmap(ensemble)
    nets[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    predicted(ensemble)
    assert len(seen) == 2
    assert not uses_vmap(ensemble)


@pytest.mark.usefixtures("vmap_wins")
def test_an_error_of_vmap_alone_at_a_later_call_is_the_loops_to_answer() -> None:
    class Sometimes(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            return outputs * float(outputs.sum()) if inputs.sum() > 100 else outputs

    nets = several(lambda: Sometimes(8, 3))
    ensemble = Ensemble(nets)
    predicted(ensemble)
    assert uses_vmap(ensemble)
    far = INPUTS + 100
    with torch.no_grad():
        torch.testing.assert_close(ensemble.outputs(far), torch.stack([net(far) for net in nets]))
    assert not uses_vmap(ensemble)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        ensemble(torch.ones(2, 7))


@pytest.mark.usefixtures("vmap_wins")
def test_gradients_flow_and_training_mode_drops_out() -> None:
    nets = several()
    ensemble = Ensemble(nets)
    predicted(ensemble)
    assert uses_vmap(ensemble)
    inputs = INPUTS.clone().requires_grad_()
    ensemble(inputs).sum().backward()
    assert inputs.grad is not None
    assert all(parameter.grad is not None for net in nets for parameter in net.parameters())
    with torch.no_grad():
        evaluated = ensemble(INPUTS)
        nets[0].train()
        assert not torch.equal(ensemble(INPUTS), evaluated)
        ensemble.eval()
        assert torch.equal(ensemble(INPUTS), evaluated)


@pytest.mark.usefixtures("vmap_wins")
def test_kinds_of_input_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensembles, "REMEMBERED", 3)
    ensemble = Ensemble(several())
    for length in range(1, 6):
        predicted(ensemble, INPUTS[:length])
        assert len(ensemble._vmap_wins) <= 3


def test_inputs_by_name_and_inputs_that_are_no_tensors() -> None:
    class Named(nn.Linear):
        def forward(self, inputs: Tensor, scale: Any = 1.0) -> Tensor:
            return super().forward(inputs) * scale

    nets = several(lambda: Named(8, 3))
    ensemble = Ensemble(nets)
    for scale in (2.0, torch.full((3,), 2.0)):
        with torch.no_grad():
            for _ in range(2):
                result = ensemble.outputs(INPUTS, scale=scale)
                torch.testing.assert_close(result, torch.stack([2 * net(INPUTS) for net in nets]))


# ------------------------------------------------------------------------------ the members stay the owners' own


def of_members(ensemble: Ensemble) -> Tensor:
    with torch.no_grad():
        inputs = INPUTS.to(next(ensemble.parameters()).dtype)
        return torch.stack([member(inputs) for member in ensemble.members])


def change_in_place(ensemble: Ensemble) -> None:
    with torch.no_grad():
        ensemble.members[1][1].weight.mul_(3.0)
        ensemble.members[2][2].running_mean.add_(1.0)


def replace(ensemble: Ensemble) -> None:
    ensemble.members[0][1].weight = nn.Parameter(torch.randn(4, 1, 3))
    ensemble.members[1][2].running_var = torch.full((4,), 3.0)


def load(ensemble: Ensemble) -> None:
    ensemble.load_state_dict(Ensemble([net.eval() for net in several(cnn, 7)[2:]]).state_dict())


def load_and_assign(ensemble: Ensemble) -> None:
    ensemble.members[3].load_state_dict(cnn().state_dict(), assign=True)


def cast(ensemble: Ensemble) -> None:
    ensemble.double()


def cast_one(ensemble: Ensemble) -> None:
    ensemble.members[4].double().float()


def train(ensemble: Ensemble) -> None:
    optimizer = torch.optim.Adam(ensemble.parameters(), 0.1)
    ensemble.train()(INPUTS).square().sum().backward()
    optimizer.step()
    ensemble.eval()


@pytest.mark.usefixtures("vmap_wins")
@pytest.mark.parametrize("change", [change_in_place, replace, load, load_and_assign, cast, cast_one, train])
def test_the_ensemble_follows_every_change_of_its_members(change: Callable[[Ensemble], None]) -> None:
    ensemble = Ensemble(several(cnn))
    before = predicted(ensemble)
    assert uses_vmap(ensemble)
    change(ensemble)
    inputs = INPUTS.to(next(ensemble.parameters()).dtype)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(ensemble.outputs(inputs), of_members(ensemble), rtol=1e-5, atol=1e-5)
    assert uses_vmap(ensemble)
    assert not torch.allclose(ensemble(inputs).float(), before) or change in (cast, cast_one)


@pytest.mark.usefixtures("vmap_wins")
def test_stacking_takes_no_second_copy() -> None:
    ensemble = Ensemble(several(cnn))
    predicted(ensemble)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ensemble.state_dict().values()}
    assert ensemble._stacked is not None
    assert {t.untyped_storage().data_ptr() for t in ensemble._stacked.tensors.values()} < storages.keys()
    tensors = [*ensemble.parameters(), *ensemble.buffers()]
    assert sum(storages.values()) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert all(tensor.is_meta for tensor in ensemble._stacked.shell.state_dict().values())


@pytest.mark.usefixtures("vmap_wins")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ensemble: pickle.loads(pickle.dumps(ensemble))])
def test_a_copy_is_equal_and_independent(copied: Callable[[Ensemble], Ensemble]) -> None:
    ensemble = Ensemble(several(cnn), [1, 2, 3, 4, 5])
    before = predicted(ensemble)
    other = copied(ensemble)
    torch.testing.assert_close(predicted(other), before)
    change_in_place(other)
    assert not torch.allclose(predicted(other), before)
    assert torch.equal(predicted(ensemble), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stay_in_single_precision_where_the_members_do_not(dtype: torch.dtype) -> None:
    ensemble = Ensemble(several(), [0.1, 0.2, 0.3, 0.15, 0.25]).to(dtype)
    assert torch.equal(ensemble.weights, torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]))
    assert ensemble(INPUTS.to(dtype)).dtype == torch.float32
    assert ensemble.to("meta").weights.is_meta


# ------------------------------------------------------------------------------ files, export, compilation


@pytest.mark.usefixtures("vmap_wins")
@pytest.mark.parametrize("stacked", [True, False])
def test_one_file_holds_all(stacked: bool, tmp_path: Path) -> None:
    ensemble = Ensemble(several(cnn), [1, 2, 3, 4, 5], dim=-1)
    expected = predicted(ensemble) if stacked else ensemble(INPUTS).detach()
    ensemble.save(tmp_path / "new" / "ensemble.pt")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ensemble.pt"]
    assert torch.load(tmp_path / "new" / "ensemble.pt", weights_only=True)["combine"] == "logits"
    loaded = Ensemble.load(tmp_path / "new" / "ensemble.pt", cnn())
    assert loaded.dim == -1
    assert torch.equal(loaded.weights, ensemble.weights)
    assert loaded.state_dict().keys() == ensemble.state_dict().keys()
    torch.testing.assert_close(loaded(INPUTS).detach(), expected, rtol=1e-5, atol=1e-6)
    assert Ensemble.load(tmp_path / "new" / "ensemble.pt", cnn().half()).members[0][1].weight.dtype == torch.float16


def test_a_function_is_given_again(tmp_path: Path) -> None:
    def largest(outputs: Tensor, weights: Tensor) -> Tensor:
        return outputs.amax(0)

    Ensemble(several(), combine=largest).save(tmp_path / "function.pt")
    Ensemble(several()).save(tmp_path / "logits.pt")
    with pytest.raises(ValueError, match="combines by a function, which the file does not hold: give it as combine="):
        Ensemble.load(tmp_path / "function.pt", mlp())
    with pytest.raises(ValueError, match="combines by no function: leave out combine="):
        Ensemble.load(tmp_path / "logits.pt", mlp(), combine=largest)
    loaded = Ensemble.load(tmp_path / "function.pt", mlp(), combine=largest)
    torch.testing.assert_close(loaded(INPUTS), Ensemble(several(), combine=largest)(INPUTS))


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ensemble.pt"
    Ensemble(several()).save(path)
    old = path.read_bytes()

    def cut(saved: Any, beside: Any) -> None:
        beside.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OSError, match="disk full"):
        Ensemble(several()).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("vmap_wins")
@pytest.mark.parametrize("make", [mlp, cnn])
def test_exports_with_any_batch(make: Callable[[], nn.Module]) -> None:
    ensemble = Ensemble(several(make, 3), [1, 2, 3])
    expected = predicted(ensemble)
    with torch.no_grad():
        program = torch.export.export(ensemble, (INPUTS,), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
        torch.testing.assert_close(program.module()(INPUTS), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(program.module()(INPUTS[:4]), expected[:4], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("vmap_wins")
def test_compiles_in_one_graph() -> None:
    ensemble = Ensemble(several(cnn, 3))
    expected = predicted(ensemble)
    with torch.no_grad():
        compiled = torch.compile(ensemble, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(INPUTS), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ averaged weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_average_weights_is_the_weighted_mean(dtype: torch.dtype) -> None:
    states = [net.to(dtype).state_dict() for net in several(cnn, 4)]
    states[0]["2.num_batches_tracked"] += 7
    weights = [0.4, 0.0, 0.5, 0.1]
    average = average_weights(states, weights)
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            expected = sum(weight * state[name].double() for weight, state in zip(weights, states)).to(dtype)
            torch.testing.assert_close(average[name], expected)
        else:
            assert average[name].item() == 7
    assert average.keys() == states[0].keys()


def test_the_ends_of_an_interpolation_are_the_states_themselves() -> None:
    first, second = (net.state_dict() for net in several(cnn, 2))
    first["1.weight"][0] = torch.inf
    for weights, state in (((1, 0), first), ((0, 1), second)):
        average = average_weights([first, second], weights)
        assert all(torch.equal(average[name], state[name]) for name in state)
        assert all(average[name].data_ptr() != state[name].data_ptr() for name in state)


def test_states_of_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"these differ: 0\.bias, 0\.weight, 1\.bias"):
        average_weights([mlp().state_dict(), cnn().state_dict()])
    with pytest.raises(ValueError, match="these differ: weight"):
        average_weights([nn.Linear(8, 3).state_dict(), nn.Linear(7, 3).state_dict()])
    with pytest.raises(ValueError, match="at least one member"):
        average_weights([])


@pytest.mark.parametrize(
    ("error", "make", "arguments", "said"),
    [
        (ValueError, Ensemble, ([],), "there must be at least one member"),
        (TypeError, Ensemble, ([3],), "members must be modules, got 3"),
        (
            ValueError,
            Ensemble,
            ([nn.Linear(1, 1)], None, "sum"),
            "combine must be 'logits' or 'binary logits' or 'mean', got 'sum'",
        ),
        (
            ValueError,
            normalized,
            ([1.0, -1.0], 2),
            "weights must be 2 finite numbers of at least 0, one for each member, and not all 0, got [1.0, -1.0]",
        ),
        (
            ValueError,
            average_weights,
            ([{"a": torch.ones(1)}, {"b": torch.ones(1)}],),
            "only states of one architecture can be averaged; these differ: a, b",
        ),
        (
            TypeError,
            Ensemble([nn.LSTM(2, 2)]),
            (torch.ones(1, 2),),
            "a member must give one tensor, got tuple: wrap the members in a module that returns the tensor to combine",
        ),
    ],
)
def test_what_is_refused_is_told_with_what_is_wanted(
    error: type[Exception], make: Any, arguments: Any, said: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(said)}$"):
        make(*arguments)


def test_an_ensemble_that_is_loaded_has_all_that_was_saved(tmp_path: Path) -> None:
    path, inputs = tmp_path / "ensemble.pt", torch.randn(2, 3, 4)
    nets = [nn.Linear(4, 4) for _ in range(3)]
    ensemble = Ensemble(nets, [3, 1, 4], "logits", dim=-1)
    ensemble.save(path)
    assert {*torch.load(path, weights_only=True)} == {"members", "weights", "combine", "dim"}
    loaded = Ensemble.load(path, nn.Linear(4, 4))
    assert (loaded.combine, loaded.dim, loaded.weights.tolist()) == ("logits", -1, [0.375, 0.125, 0.5])
    torch.testing.assert_close(loaded(inputs), ensemble(inputs))
    double = Ensemble.load(path, nn.Linear(4, 4).double())
    assert {parameter.dtype for parameter in double.parameters()} == {torch.float64}
    assert double.weights.dtype == torch.float32
    function = Ensemble(nets, combine=lambda outputs, weights: outputs[0], dim=1)
    function.save(path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'the ensemble in {path} combines by a function, which')}"):
        Ensemble.load(path, nn.Linear(4, 4))


def test_members_that_were_made_for_inference_alone_predict() -> None:
    with torch.inference_mode():
        nets = several(members=2)
    ensemble = Ensemble(nets)
    with torch.no_grad():
        expected = mean_probabilities(nets, [0.5, 0.5])
        for _ in range(2):
            torch.testing.assert_close(ensemble(INPUTS).softmax(-1), expected.float())
