import json
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex

from lightning_recipes.core.findings import Finding
from lightning_recipes.core.trials import (
    Outcome,
    Readings,
    SweepResult,
    Trial,
    TrialRule,
    load_outcomes,
    mean_loss,
    save_outcomes,
)


def judged(losses: list[float], norms: list[float] | None = None) -> Outcome:
    rule = TrialRule(len(losses))
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        if rule.update(loss, norm):
            break
    return rule.outcome()


def falling(steps: int = 100, low: float = 0.5, noise: float = 0.05, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    return [low + 2 * math.exp(-step / 20) + noise * chance.gauss(0, 1) for step in range(steps)]


@pytest.mark.parametrize("shift", [0.0, -5.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_falls_is_stable_whatever_its_zero_is(seed: int, shift: float) -> None:
    losses = [loss + shift for loss in falling(seed=seed)]
    outcome = judged(losses)
    assert outcome.stable
    assert outcome.loss == pytest.approx(sum(losses[-10:]) / 10)
    assert outcome.steps == 100


@pytest.mark.parametrize("steps", [20, 100, 200])
def test_a_loss_that_does_not_move_is_stable_however_noisy(steps: int) -> None:
    chance = random.Random(0)
    stable = sum(judged([2.3 + 0.2 * chance.gauss(0, 1) for _ in range(steps)]).stable for _ in range(200))
    assert stable >= 199


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_has_risen_beyond_its_noise_is_not_stable(seed: int) -> None:
    chance = random.Random(seed)
    risen = judged([2.3 + 0.02 * chance.gauss(0, 1) + 0.15 * min(1, step / 50) for step in range(100)])
    assert "above the first one" in risen.reason


def test_the_first_certain_sign_ends_it() -> None:
    broken = judged([*falling(30), math.nan, *falling(9)])
    assert (broken.stable, broken.steps, broken.reason) == (False, 31, "not finite at step 30")
    gradient = judged(falling(), [1.0] * 40 + [math.inf] + [1.0] * 59)
    assert (gradient.stable, gradient.steps, gradient.reason) == (False, 41, "not finite at step 40")
    blown = judged([2.0, 2.5, 20.0, 30.0, 3000.0, 1.0])
    assert (blown.steps, blown.reason) == (5, "the loss rose from 2 to 3e+03 at step 4")
    assert math.isnan(blown.loss)


def test_a_block_is_ten_updates() -> None:
    readings = Readings(TrialRule(60))
    for _ in range(2):
        assert [readings.add(torch.ones(()), torch.ones(())) for _ in range(10)] == [False] * 9 + [True]
        assert not readings.read(lambda values: values + 1)  # the mean over ranks
    assert readings.rule.losses == [2.0] * 20
    assert not readings.read()


@pytest.mark.parametrize("ends", [0, 3, 17, 29, 60])
def test_blocks_are_judged_as_one_after_the_other(ends: int) -> None:
    losses = [*falling(ends), *([math.nan] * 40 if ends < 60 else [])]
    alone, readings = TrialRule(60), Readings(TrialRule(60))
    over, done = False, 0
    for loss in losses:
        over = over or alone.update(loss, 1.0, 0.1)
        done += 1
        if readings.add(torch.tensor([loss], dtype=torch.float64), torch.tensor(1.0), 0.1) and readings.read():
            break
    assert readings.read() == over == (ends < 60)
    assert readings.read() == over
    assert done <= ends + 10
    ours, theirs = readings.rule.outcome(), alone.outcome()
    assert (ours.stable, ours.steps, ours.reason) == (theirs.stable, theirs.steps, theirs.reason)
    assert ours.losses == pytest.approx(theirs.losses, nan_ok=True)


def test_dead_units_end_it_too() -> None:
    chance = random.Random(1)
    losses = [*falling(60), *[2.3 + 0.01 * chance.gauss(0, 1) for _ in range(140)]]
    outcome = judged(losses, [1.0] * 60 + [0.02] * 140)
    assert not outcome.stable
    assert "vanishing gradient" in outcome.reason or "had been down" in outcome.reason


def test_a_training_that_is_stuck_is_over_before_its_end() -> None:
    chance = random.Random(1)
    losses = [*falling(60), *[1.4 + 0.3 * chance.random() for _ in range(140)]]
    outcome = judged(losses, [1.0] * 60 + [0.002] * 140)
    assert outcome.reason.startswith("vanishing gradient")
    assert outcome.steps < 200


@pytest.mark.parametrize("steps", [60, 100, 500])
@pytest.mark.parametrize("seed", [0, 2, 3, 4, 5])
def test_one_batch_for_ever_is_learnt_and_not_stuck(seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    model = torch.nn.Linear(8, 1)
    inputs, targets = torch.randn(64, 8), torch.randn(64, 1)
    optimizer, rule = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), TrialRule(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        torch.autograd.backward(loss)
        norm = float(torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None]))
        assert not rule.update(float(loss.detach()), norm, 1.0)
        optimizer.step()
    assert rule.outcome().stable


def test_dead_units_at_the_lowest_loss_are_stuck() -> None:
    chance = random.Random(1)
    losses = [2.3 + 0.6 * math.exp(-step / 10) + 0.02 * chance.gauss(0, 1) for step in range(150)]
    assert judged(losses, [1.0] * 60 + [0.002] * 90).reason.startswith("vanishing gradient at step ")


def test_a_rise_that_comes_back_is_stable_and_one_that_stays_is_not() -> None:
    bump = [loss + (6 if 40 <= step < 60 else 0) for step, loss in enumerate(falling(150))]
    assert judged(bump).stable
    stays = [loss + (1.0 if step >= 60 else 0) for step, loss in enumerate(falling(150))]
    assert judged(stays).reason.startswith("the loss ended at 1.5")
    above = [2.5 + 0.02 * step for step in range(100)]
    assert "above the first one" in judged(above).reason


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_may_begin_near_zero(seed: int) -> None:
    chance = random.Random(seed)
    fine = [1e-4, *(chance.gauss(0, 1) - step / 100 for step in range(199))]
    assert judged(fine).stable
    broken = judged([*fine[:50], *(2.0**step for step in range(20)), *fine[50:]])
    assert broken.reason.startswith("the loss rose from 0.0001")
    assert 54 < broken.steps < 62


@pytest.mark.parametrize("factor", [2, 5, 1000])
def test_a_loss_that_explodes_from_the_start_is_over_soon(factor: float) -> None:
    assert judged([min(2.3 * factor**step, 1e9) for step in range(100)]).steps < 12
    assert judged([2.3, *[2.3e4] * 99]).steps == 5


def test_what_a_grad_scaler_skips_is_normal() -> None:
    rule = TrialRule(40)
    assert not any(
        rule.update(loss, math.inf if step < 3 else 1.0, scaled=True) for step, loss in enumerate(falling(40))
    )
    assert rule.outcome().stable


def test_long_curves_are_thinned_out() -> None:
    losses = falling(1000)
    outcome = judged(losses)
    assert outcome.losses == tuple(losses[::4])
    assert outcome.loss == pytest.approx(sum(losses[-100:]) / 100)  # of the last tenth
    assert len(judged(falling(300)).losses) == 300
    nothing = TrialRule(20).outcome()
    assert (nothing.steps, nothing.losses) == (0, ())


def test_a_trial_rises_and_stays() -> None:
    trial = Trial(0.1, 10, warmup_steps=3)
    assert [trial.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert Trial(0.1, 10).factor(0) == 1


OUTCOMES = {
    Trial(0.1, 100): Outcome(True, 0.5, 100, "", (2.0, 0.5)),
    Trial(0.1, 100, seed=1): Outcome(True, 0.7, 100),
    Trial(1.0, 100, 10): Outcome(False, math.nan, 7, "not finite at step 6", (2.0, math.inf, math.nan)),
    Trial(1.0, 300, 100): Outcome(True, 0.2, 300),
}


def test_outcomes_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sweep.json"
    assert load_outcomes(path) == {}
    save_outcomes(path, OUTCOMES)
    json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert repr(load_outcomes(path)) == repr(
        dict(sorted(OUTCOMES.items(), key=lambda item: (item[0].learning_rate, item[0].warmup_steps)))
    )
    assert [each.name for each in path.parent.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[1]", "TypeError: list indices must be integers or slices, not str"),
        ("{}", "KeyError: 'trials'"),
        ("1e3 é", "JSONDecodeError: Extra data: line 1 column 5 (char 4)"),
    ],
)
def test_a_file_without_outcomes_is_refused(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(text, encoding="utf-8")
    said = f"{path} has no outcomes of a sweep ({error}): give another path, or delete it to start anew"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        load_outcomes(path)


def test_figures_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = "figures need matplotlib: pip install 'lightning-recipes[plots]'"
    with pytest.raises(ImportError, match=f"^{re.escape(said)}$"):
        result().plot()


def result(**more: Any) -> SweepResult:
    finding = Finding("warmup found", "info", "A warmup helps.", "Use it.", 507)
    return SweepResult(Trial(1.0, 300, 100), finding, OUTCOMES, **more)


def test_a_result_says_everything_in_a_table() -> None:
    made = result()
    assert made.steps == 507
    assert [(row["learning_rate"], row["warmup_steps"], row["trials"], row["stable"]) for row in made.table()] == [
        (0.1, 0, 2, 2),
        (1.0, 10, 1, 0),
        (1.0, 100, 1, 1),
    ]
    assert made.table()[0]["loss"] == pytest.approx(0.6)
    assert "| 1 | 100 | 300 | 1 of 1 | 0.2 | **recommended** |" in made.to_markdown()
    assert "| 1 | 10 | 100 | 0 of 1 |  | not finite at step 6 |" in made.to_markdown()
    assert made.to_markdown().endswith("A warmup helps. Use it.")
    assert made._repr_html_().count("<tr>") == 4
    assert math.isnan(mean_loss([]))


def test_a_result_is_drawn(tmp_path: Path) -> None:
    figure, axes = result().plot()
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["0.6", "unstable\n0/1", "0.2"]
    figure.savefig(tmp_path / "map.png")
    again, same = result().plot(axes)
    assert (again, same) == (figure, axes)
    _, curves = result().plot_curves()
    assert [line.get_label() for line in curves.lines] == ["1, warmup 10 (unstable)", "1, warmup 100"]
    rates = SweepResult(
        None, result().finding, {trial: outcome for trial, outcome in OUTCOMES.items() if not trial.warmup_steps}
    )
    assert len(rates.plot()[1].lines) == 1


def test_what_is_given_back_is_a_third_of_the_gain_at_most() -> None:
    for end, stable in ((1.29, True), (1.31, False)):
        outcome = judged([2.0] * 10 + [1.0] * 30 + [end] * 60)
        assert outcome.stable == stable
        assert outcome.loss == pytest.approx(end) if stable else "had been down at 1" in outcome.reason
    for end, stable in ((1.99, True), (2.01, False)):
        assert judged([2.0] * 10 + [end] * 60).stable == stable
    assert judged([2.0] * 5 + [3.0] * 5).stable  # of ten updates nothing can be told
    assert judged([1.0, *[2.0] * 9, *[1.9] * 60]).stable  # the first batch was an easy one


def test_a_rise_to_a_hundred_times_the_first_loss_above_it_ends_it() -> None:
    for peak, steps in ((201.9, 60), (202.1, 31)):
        assert judged([2.0] * 30 + [peak] + [2.0] * 29).steps == steps


def test_the_curves_are_drawn_where_they_were() -> None:
    losses = tuple(float(point) for point in range(100))
    outcomes = {
        Trial(0.01, 100): Outcome(True, 3.0, 100, losses=losses),
        Trial(0.1, 100): Outcome(True, 0.5, 100, losses=losses),
        Trial(0.1, 500, validates=True): Outcome(True, 0.25, 500, losses=losses, val_loss=0.4),
        Trial(0.1, 500, seed=1, validates=True): Outcome(True, 0.35, 500, losses=losses, val_loss=0.6),
        Trial(1.0, 100): Outcome(False, math.nan, 50, "not finite", losses),
    }
    swept = replace(result(), best=Trial(0.1, 500, validates=True), outcomes=outcomes)
    _, axes = swept.plot()
    drawn = {line.get_label(): line for line in axes.lines}
    assert drawn["training, 100 steps"].get_xydata().tolist() == [[0.01, 3.0], [0.1, 0.5]]
    assert drawn["training, 500 steps"].get_xydata() == pytest.approx(torch.tensor([[0.1, 0.3]]).numpy())
    assert drawn["validation, 500 steps"].get_xydata() == pytest.approx(torch.tensor([[0.1, 0.5]]).numpy())
    assert list(drawn["recommended"].get_xdata()) == [0.1, 0.1]
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in dotted] == [[1.0, 1.0]]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    below = {trial: replace(outcome, loss=outcome.loss - 1) for trial, outcome in outcomes.items()}
    assert replace(swept, outcomes=below).plot()[1].get_yscale() == "linear"
    at_zero = {trial: replace(outcome, loss=max(0.0, outcome.loss - 0.5)) for trial, outcome in outcomes.items()}
    assert replace(swept, outcomes=at_zero).plot()[1].get_yscale() == "linear"
    _, axes = swept.plot_curves()
    assert [(line.get_label(), line.get_linestyle(), line.get_xdata()[-1]) for line in axes.lines] == [
        ("0.1", "-", 99 * 5),  # of the longest trial
        ("1 (unstable)", ":", 99),
    ]
    assert len(replace(swept, best=None).plot_curves()[1].lines) == 3


def test_the_map_has_a_square_for_each_rate_and_warmup() -> None:
    _, axes = result().plot()
    squares = [(*each.get_offsets()[0].tolist(), *each.get_facecolor()[0][:3]) for each in axes.collections[:-1]]
    assert [square[:2] for square in squares] == [(0, 0), (1, 1), (2, 1)]
    assert squares[1][2:] == (0.9, 0.9, 0.9)  # grey, unstable
    assert squares[0][2] > squares[2][2]  # 0.6 is worse than 0.2
    assert all(0 <= part <= 1 for square in squares for part in square[2:])
    frame = axes.collections[-1]
    assert frame.get_offsets()[0].tolist() == [2, 1]  # around the best
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "10", "100"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0.1", "1"]
    alike = {trial: replace(outcome, loss=0.5) for trial, outcome in OUTCOMES.items()}
    assert len(replace(result(), outcomes=alike).plot()[1].collections) == 4


@pytest.mark.parametrize("mean", [None, lambda values: values])
def test_readings_keep_losses_and_norms_apart(mean: Any) -> None:
    seen: list[tuple[float, float]] = []
    rule = TrialRule(4)
    rule.update = lambda loss, norm, *_: bool(seen.append((loss, norm)))  # type: ignore[func-returns-value, method-assign]
    readings = Readings(rule)
    for step in range(4):
        readings.add(torch.tensor(float(step)), torch.tensor([10.0 + step]))
    assert not readings.read(mean)
    assert seen == [(0.0, 10.0), (1.0, 11.0), (2.0, 12.0), (3.0, 13.0)]


def test_figures_name_what_they_show() -> None:
    made = result()
    validated = {trial: replace(outcome, val_loss=1.0) for trial, outcome in OUTCOMES.items() if not trial.warmup_steps}
    rates = replace(made, best=Trial(0.1, 100), outcomes=validated)
    for (figure, axes), title, x, y in (
        (made.plot(), "training loss at the end of the trials", "warmup steps", "learning rate"),
        (rates.plot(), "", "learning rate (dotted: unstable)", "loss"),
        (made.plot_curves(), "", "update", "training loss"),
    ):
        assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (title, x, y)
        assert figure.get_size_inches().tolist() == [8, 5]
    legend = rates.plot()[1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "training, 100 steps",
        "validation, 100 steps",
        "recommended",
    ]
    _, curves = made.plot_curves()
    assert curves.get_yscale() == "symlog"
    assert curves.get_legend() is not None


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_loss_above_its_start_or_its_best_has_to_be_so_by_three_deviations(share: float) -> None:
    """Of the first ten, which have one of 0.1, or of the last forty, whichever is the smaller."""

    def swings(level: float, by: float, count: int) -> list[float]:
        return [level - by, level + by] * (count // 2)

    wide, narrow = 0.2, 0.1 * 1.349 / 2  # a deviation of 0.1, from the quartiles
    for losses in (
        swings(2.0, 0.1, 10) + swings(1.9 + 0.3 * share, wide, 90),
        swings(2.0, wide, 10) + swings(2.0, wide, 50) + swings(1.8 + 0.3 * share, narrow, 40),
    ):
        assert judged(losses).stable == (share < 1)
    back = swings(2.0, 0.1, 10) + [1.0] * 40 + swings(1.27 + 0.3 * share, wide, 50)
    assert judged(back).stable == (share < 1)


def drawn(axes: Any) -> list[str]:
    """What a figure shows, and how."""
    lines = [
        f"{line.get_label().split('_child')[0]} at {[float(x) for x in line.get_xdata()][:1]}:"
        f" {to_hex(line.get_color())} {line.get_linestyle()} {line.get_linewidth():g} {line.get_marker()}"
        for line in axes.lines
    ]
    squares = [
        f"square at {each.get_offsets()[0].tolist()}: {each.get_sizes().tolist()} {float(each.get_linewidths()[0])}"
        f" {each.get_facecolor().round(3).tolist()} {each.get_edgecolor().round(3).tolist()}"
        f" {len(each.get_paths()[0].vertices)}"
        for each in axes.collections
    ]
    texts = [
        f"{text.get_text()!r} at {text.get_position()}, {text.get_ha()} {text.get_va()} {text.get_fontsize():g}"
        for text in axes.texts
    ]
    legend = axes.get_legend()
    sizes = [f"legend of size {text.get_fontsize():g}" for text in legend.get_texts()] if legend else []
    margins = f"margins {axes.margins()[0]:g} {axes.margins()[1]:g}"
    return [*lines, *squares, *texts, *sizes, margins, f"{axes.get_xscale()} {axes.get_yscale()}"]


def test_what_trials_end_with_is_told_word_for_word(word_for_word: Callable[..., None]) -> None:
    noise = random.Random(1)
    stuck = [*falling(60), *[1.4 + 0.3 * noise.random() for _ in range(140)]]
    lowest = [2.3 + 0.6 * math.exp(-step / 10) + 0.02 * noise.gauss(0, 1) for step in range(150)]
    reasons = [
        judged([2.0, math.nan]).reason,
        judged([2.0, 2.0, 2.0, 2.0, 3000.0]).reason,
        judged(stuck, [1.0] * 60 + [0.002] * 140).reason,
        judged(lowest, [1.0] * 60 + [0.002] * 90).reason,
        judged([2.0] * 10 + [2.123] * 60).reason,
        judged([2.0] * 10 + [1.234] * 30 + [1.75] * 60).reason,
    ]
    validated = {trial: replace(outcome, val_loss=2 * outcome.loss) for trial, outcome in OUTCOMES.items()}
    half = {**OUTCOMES, Trial(0.1, 100, seed=2): Outcome(False, math.nan, 100, "it rose", val_loss=9.0)}
    swept = (result(), replace(result(), outcomes=validated), replace(result(), outcomes=half, best=None))
    rates = {trial: replace(outcome, val_loss=1.0) for trial, outcome in OUTCOMES.items() if not trial.warmup_steps}
    rates |= {Trial(0.01, 100): Outcome(True, 0.25, 100), Trial(3.0, 100): Outcome(False, math.nan, 7)}
    figures = [
        replace(result(), best=Trial(0.1, 100), outcomes=rates).plot(),
        result().plot(),
        replace(result(), best=Trial(0.1, 100), outcomes=OUTCOMES).plot_curves(),
    ]
    tables = [[each.to_markdown(), each._repr_html_(), each.table()[0]] for each in swept]
    word_for_word(reasons, *tables, *(drawn(axes) for _, axes in figures))


def test_a_sweep_without_a_stable_trial_is_drawn_and_has_no_summary() -> None:
    unstable = {trial: replace(outcome, stable=False) for trial, outcome in OUTCOMES.items()}
    made = SweepResult(None, result().finding, unstable)
    assert [text.get_text() for text in made.plot()[1].texts] == ["unstable\n0/2", "unstable\n0/1", "unstable\n0/1"]
    assert [line.get_linestyle() for line in made.plot_curves()[1].lines] == [":"] * 3
    nothing = SweepResult(None, made.finding, {})
    assert (nothing.summary, nothing.steps, nothing.table()) == ({}, 0, [])
    assert "losses" not in repr(Outcome(True, 1.0, 1, losses=(1.0,)))  # hundreds of numbers
