import math
import re
from typing import Any

import pytest
from pages import Page

from lightning_recipes.core.findings import Finding
from lightning_recipes.core.series import Series
from lightning_recipes.report.numbers import shown
from lightning_recipes.report.page import _bins, render
from lightning_recipes.report.run import STEP_LOSS, Run
from lightning_recipes.report.story import best, events, group, panels, verdict
from lightning_recipes.report.svg import Axis, Line, Point, chart

NASTY = "<script>alert('x')</script> \"&amp;\" | `*_[a](http://b) \u2028 ]]> {{ 7*7 }}"


def series(values: list[float], every: int = 10) -> Series:
    made = Series()
    for index, value in enumerate(values):
        made.update(index * every, value)
    return made


def falling(points: int = 100) -> Series:
    return series([2.0 / (1 + index / 10) for index in range(points)])


def finding(rule: str = "spike", severity: Any = "warning", step: int = 30, **evidence: float | str) -> Finding:
    return Finding(rule, severity, f"{rule} was seen.", f"Cure {rule}.", step, dict(evidence))


def page(run: Run) -> Page:
    return Page(render(run)[0])


def test_an_empty_run_is_a_page() -> None:
    read = page(Run())
    assert read.all("svg") == []
    assert "Nothing was logged and nothing found." in read.text


def test_every_name_and_value_is_escaped() -> None:
    nasty = {NASTY: NASTY}
    run = Run(NASTY, NASTY, {NASTY: falling(), f"val {NASTY}": falling()}, [Finding(NASTY, "error", NASTY, NASTY, 3)])
    run.hyperparameters = run.callbacks = run.setup = run.costs = nasty
    run.ensemble, run.sources, run.notes = f"| {NASTY} |\n|---|\n| {NASTY} |\n\n{NASTY}", [NASTY], [NASTY]
    html, markdown = render(run)
    read = Page(html)
    assert "<script" not in html
    assert "alert('x')" in read.text
    assert "{{ 7*7 }}" in read.text
    before = markdown.partition("## Ensemble")[0]
    assert "<script" not in before.replace("\\<", "")


def test_every_picture_says_what_it_shows() -> None:
    run = Run(series={STEP_LOSS: falling(), "val_loss": falling(20), "grad_norm": falling(), "lr-SGD": falling()})
    html, _ = render(run)
    read = Page(html)
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == len(read.all("svg")) == 5  # the first is there for a wide and for a narrow screen
    for picture in pictures:
        said = re.search(r"<title[^>]*>(.+?)</title><desc[^>]*>(.+?)</desc>", picture)
        assert said is not None
        assert re.search(r"\d", said[2])
    assert "lowest 0.1835 at 990" in read.text


def test_nothing_comes_from_outside() -> None:
    html, _ = render(
        Run(series={"loss": falling()}, findings=[finding()], pictures={"Map": "data:image/png;base64,aa"})
    )
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "@import" not in html
    assert page(Run(pictures={"Map": "data:image/png;base64,aa"})).all("img")[0]["alt"] == "Map"


@pytest.mark.parametrize(
    "values",
    [
        [math.nan],
        [math.nan] * 50,
        [1.0, math.nan, 2.0, math.inf, 3.0, -math.inf, 1.0],
        [0.0] * 10,
        [5.0],
        [1e-300, 1e140],
        [-1e140, 1e140],
        [1e16, 1e16 + 2],
        [1e300],
        [-3.0, -2.0],
        [0.1, 10.0, 1e9],
        [1e-12] * 3,
    ],
    ids=str,
)
def test_values_of_every_kind_are_drawn_or_told(values: list[float]) -> None:
    run = Run(
        series={"train_loss": series(values), "val_loss": falling(), "grad_norm": series(values), "x": series(values)}
    )
    html, markdown = render(run)
    Page(html)
    for numbers in re.findall(r' (?:x|y|x1|y1|x2|y2|cx|cy|width|height|points)="([^"]*)"', html):
        assert all(math.isfinite(float(number)) for number in re.split(r"[ ,]", numbers))
    if any(not math.isfinite(value) for value in values):
        assert "not finite" in markdown or "Never finite: train\\_loss, grad\\_norm, x" in markdown


def test_positions_stay_within_the_picture() -> None:
    lines = [Line("loss", [Point(step, 10.0 ** (-step / 10), 0.0, 0.0) for step in range(100)])]
    html = str(chart("k", "t", "d", lines))
    for x, y in re.findall(r"([\d.]+),([\d.]+)", html):
        assert 0 <= float(x) <= 360
        assert 0 <= float(y) <= 220


def test_the_scale_is_logarithmic_where_the_data_span_decades() -> None:
    spans = [Point(step, 10.0 ** (-step / 20), 10.0 ** (-step / 20), 10.0 ** (-step / 20)) for step in range(100)]
    flat = [Point(step, 1 + step / 100, 1.0, 2.0) for step in range(100)]
    assert ">0.001<" in str(chart("k", "t", "d", [Line("a", spans)]))
    assert ">1.5<" in str(chart("k", "t", "d", [Line("a", flat)]))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.0, 3.1), (-5e8, 2e9), (0.0, 7e-9), (1000.0, 1001.0)])
def test_ticks_are_round_few_and_within(low: float, high: float) -> None:
    ticks = Axis(low, high, 0, 100).ticks(5)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in ticks)


@pytest.mark.parametrize("middle", [2.3026, 0.99905, -12345.0, 10240.0, 3e-9, 1e9])
def test_no_two_ticks_have_the_same_number(middle: float) -> None:
    for width in (1e-4, 1e-6):
        points = [Point(step, value, value, value) for step in range(20) for value in [middle * (1 + width * step)]]
        written = re.findall(r'text-anchor="end">([^<u]*)<', str(chart("k", "t", "d", [Line("a", points)])))
        assert len(written) >= 2
        assert len({*written}) == len(written)


def test_findings_of_a_rule_are_together_and_the_worst_first() -> None:
    told = [finding("a", "info", 1), finding("b", "warning", 2), finding("c", "error", 3), finding("b", "warning", 9)]
    groups = group(told)
    assert [each.latest.rule for each in groups] == ["c", "b", "a"]
    assert groups[1].when == "steps 2, 9, 2 times"
    symptoms_and_cause = [finding("early", "warning", 5), finding("late", "warning", 9), finding("cause", "warning", 0)]
    assert [each.latest.rule for each in group(symptoms_and_cause)] == ["cause", "late", "early"]
    text = page(Run(findings=told)).text
    assert text.index("Cure c") < text.index("Cure b") < text.index("Cure a")


def test_many_steps_of_a_rule_are_abbreviated() -> None:
    assert group([finding(step=step) for step in range(100)])[0].when == "steps 0, 1, 2, 3, 4, 5, 6, …, 99, 100 times"


def test_the_verdict_has_how_it_went_what_matters_and_what_to_do() -> None:
    run = Run(
        ended="finished", series={"val_loss": falling()}, findings=[finding("a", "info"), finding("b", "warning")]
    )
    how, what, then = verdict(run)
    assert how == "Finished after 991 updates. Best val_loss 0.1835 at step 990; the last one."
    assert what == "Warning, b: b was seen."
    assert then == "Cure b."
    assert "not finite" in verdict(Run(series={"train_loss": series([1.0, math.nan])}))[0]


@pytest.mark.parametrize(
    ("ended", "loss", "told", "said"),
    [
        ("failed by RuntimeError: boom", [1.0], [], "Error: the training failed."),
        ("failed by RuntimeError: boom", [1.0], [finding("a", "info")], "Error: the training failed."),
        ("finished", [1.0] * 998 + [math.nan] * 2, [], "Error: train_loss was not finite at the end."),
        ("failed by RuntimeError: boom", [1.0], [finding("b", "warning")], "Warning, b: b was seen."),
    ],
)
def test_a_training_that_went_wrong_is_never_sound(
    ended: str, loss: list[float], told: list[Finding], said: str
) -> None:
    run = Run(ended=ended, series={"train_loss": series(loss)}, findings=told, callbacks={"A": "b"})
    assert verdict(run)[1].startswith(said)
    assert page(run).all("section")[0]["class"] == "verdict error"


def test_best_and_last_are_those_of_single_validations_however_many() -> None:
    losses = [0.1 + (number * 7919 % 13) / 100 for number in range(1000)]
    losses[437] = 0.01
    run = Run(series={"val_loss": series(losses)})
    assert f"Best val_loss 0.01 at step 4,370; the last one was {shown(losses[-1])}." in verdict(run)[0]
    run.series["val_loss"].update(10_000, math.nan)
    assert "the last one was not finite" in verdict(run)[0]


def test_metrics_of_different_data_share_their_axes() -> None:
    made = {panel.title: panel.names for panel in panels(["train_loss", "val/loss", "trainAcc", "val_acc_epoch", "x"])}
    assert made == {"loss": ["train_loss", "val/loss"], "acc": ["trainAcc", "val_acc_epoch"], "x": ["x"]}


def test_names_in_any_script_are_told_apart() -> None:
    made = {panel.title: panel.names for panel in panels(["损失_a", "精度_a", "précision", "val_损失_a"])}
    assert made == {
        "损失 a": ["损失_a", "val_损失_a"],
        "精度 a": ["精度_a"],
        "précision": ["précision"],
    }


def test_the_best_validation_has_the_direction_of_its_metric() -> None:
    for name, value in (("val_loss", 1.0), ("val_acc", 3.0), ("val/f1", 3.0)):
        found = best(Run(series={name: series([2.0, 1.0, 3.0, 2.0])}))
        assert found is not None
        assert found.value == value
    assert best(Run(series={"val_something": series([1.0])})) is None


def test_events_come_from_findings_and_learning_rates() -> None:
    rate = series([0.1] * 10 + [0.01] * 10 + [0.1, 0.099, 0.098, 0.097])
    told = [
        finding(decision="cancelled", step=31),
        finding(decision="went back", step=50),
        finding(decision="told", step=60),
        finding("learning rate cut", "info", 70),
        finding("gradient not finite", step=80),
        finding("overfitting", step=240),  # at the end: not an event of the run
        finding("warmup found", "info", 0),
        finding("softmax applied twice", step=0),  # before it
    ]
    run = Run(series={"lr-SGD": rate, "val_loss": falling(20)}, findings=told, resumed=[120])
    found = {event.letter: event.step for event in events(run, {"lr-SGD": rate})}
    assert found == {"S": 31, "R": 50, "I": 60, "C": 100, "N": 80, "U": 200, "P": 120, "B": 190}
    text = page(run).text
    for label in ("update skipped at 31", "went back at 50", "resumed at 120"):
        assert label in text


def test_what_happened_once_is_marked_once() -> None:
    rate = series([0.1] * 10 + [0.01] * 10)
    told = [
        finding("learning rate cut", "info", 98),
        finding("not finite", step=120, decision="told"),
        finding("gradient not finite", step=140, nonfinite=1),
    ]
    run = Run(series={"lr-SGD": rate}, findings=told)
    assert [(event.letter, event.step) for event in events(run, {"lr-SGD": rate})] == [("C", 98), ("N", 120)]


@pytest.mark.parametrize(
    ("losses", "label"),
    [
        ([1.0] * 40 + [math.nan] * 60, "loss not finite from about 40 on"),
        ([1.0] * 40 + [math.nan] + [1.0] * 59, "loss not finite at about 40"),
        ([1.0] * 40 + [math.nan] + [1.0] * 58 + [math.nan], "loss not finite at about 40 first, 2 times in all"),
        ([1.0] * 40 + [math.nan] * 3 + [1.0] * 57, "loss not finite at about 40 first, 3 times in all"),
        ([1.0] * 996 + [math.nan] + [1.0] * 2, "loss not finite at about 997"),  # in the last of the bins
    ],
)
def test_a_loss_that_is_finite_again_is_not_said_to_have_stayed_so(losses: list[float], label: str) -> None:
    run = Run(series={STEP_LOSS: series(losses, every=1)})
    assert [(event.letter, event.label) for event in events(run, {})] == [("N", label)]
    skipped = [finding("not finite", step=40, decision="cancelled")]
    run.findings = skipped
    assert [(event.letter, event.label) for event in events(run, {})] == [("S", "update skipped at 40: not finite")]


def test_a_kind_of_event_is_said_once() -> None:
    told = [finding("not finite", step=96, decision="told")]
    assert [event.label for event in events(Run(findings=told), {})] == ["not finite at 96"]


def test_a_lost_loss_points_to_data_and_loss_before_the_rate() -> None:
    advice = verdict(Run(ended="finished", series={"train_loss": series([1.0, math.nan])}))[2]
    assert advice.index("data") < advice.index("logarithm") < advice.index("learning rate")


def test_letters_have_their_key_without_curves_too() -> None:
    run = Run(series={"grad_norm": falling()}, findings=[finding(decision="cancelled", step=31)])
    read = page(run)
    assert not any(each.get("id") == "curves" for each in read.all("section"))
    assert [each["class"] for each in read.all("ul") if "class" in each].count("key") == 1
    assert "update skipped at 31" in read.text


def test_a_training_that_has_just_begun_asks_for_nothing() -> None:
    how, what, _ = verdict(Run(ended="running", costs={"wall time": "0.004 s"}))
    assert (how, what) == ("Running.", "Nothing was logged yet.")


def test_thousands_of_events_are_no_burden() -> None:
    told = [finding(decision="cancelled", step=step) for step in range(20_000)]
    html, markdown = render(Run(series={"loss": series([1.0] * 2000)}, findings=told))
    assert len(html) < 100_000
    assert "update skipped, 20,000 times" in markdown


def test_a_decaying_learning_rate_is_no_cut() -> None:
    for rate in ([0.5**step for step in range(30)], [1 + math.cos(step / 30 * math.pi) for step in range(31)]):
        assert not {event.letter for event in events(Run(), {"lr": series(rate)})} & {"C", "U"}


def test_many_series_are_split_into_pictures_or_left_out_by_name() -> None:
    ratios = {f"update_ratio/layer{number}": falling() for number in range(9)}
    many = {f"metric {number}": falling(3) for number in range(50)}
    rates = {f"lr-SGD/pg{number}": falling() for number in range(30)}
    read = page(Run(series={"loss": falling(), **ratios, **rates, **many}))
    assert "about 0.001 is healthy" in read.text
    assert "Not drawn:" in read.text
    assert "metric 49" in read.text
    assert all(f"lr-SGD/pg{number}" in read.text for number in range(30))


def test_gradients_have_their_threshold_and_a_histogram() -> None:
    run = Run(series={"grad_norm": falling(), "grad_norm_threshold": falling(), "clipped_fraction": falling()})
    assert "Gradient norms as logged" in page(run).text
    assert "clipped, at 0 of 100 points" in page(run).text
    run.bins = [(0.1, 1.0, 5.0), (1.0, 10.0, 1.0)]
    read = page(run)
    assert "Gradient norms: most often between 0.1 and 1" in read.text
    assert len(read.all("rect")) == 2


def test_of_thousands_of_gradients_none_is_averaged_away() -> None:
    norms = [10.0 if index % 10 == 0 else 1.0 for index in range(2000)]
    made = {"grad_norm": norms, "grad_norm_threshold": [2.0] * 2000, "clipped_fraction": [0.1] * 2000}
    run = Run(series={name: series(values) for name, values in made.items()})
    text = page(run).text
    assert "clipped, in 10% of the last updates" in text
    assert "of 250 points" not in text
    assert "all between 1 and 10" in text
    counts = [count for *_, count in _bins([run.series["grad_norm"]])]
    assert sum(counts) == pytest.approx(2000)
    assert min(counts) > 0


def test_the_members_of_an_ensemble_are_a_table() -> None:
    run = Run(ensemble="| member | weight |\n|---|---|\n| snapshot 1 | 0.5 |\n| **ensemble** | 1 |\n\nIt helps.")
    read = page(run)
    assert [len(read.all(tag)) for tag in ("th", "td")] == [2, 4]
    assert "It helps." in read.text


def test_what_is_no_number_is_said() -> None:
    assert [shown(value) for value in (math.nan, math.inf, -math.inf)] == ["NaN", "inf", "-inf"]


@pytest.mark.parametrize("value", [0.00012345, 1.0, 999.96, 1e11, 123456.7, -2.5, 1e-300])
def test_four_significant_digits(value: float) -> None:
    assert float(shown(value).replace(",", "")) == pytest.approx(value, rel=6e-4)
