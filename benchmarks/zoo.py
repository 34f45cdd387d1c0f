"""What the recipes say of broken trainings, each with one defect, and of healthy ones.

    python benchmarks/zoo.py [PART ...] [--only NAME ...] [--every 4]

All on real data (scikit-learn's digits, diabetes, wine and breast cancer, Fashion-MNIST, Python's own help texts), all
watched by the same callbacks with default arguments, and asked about by ``diagnose`` in the end. A defect counts as
found if one of the first two findings that say more than that all is well names it, the severer ones first. Healthy
runs should have none above "info". Rules were mended on "broken" and "healthy"; "fresh", "later" and "healthy-later",
then "unseen", and then "last" and "healthy-last" were written when the rules stood, and run once before any rule was
mended on them. "crossed", "elsewhere", "more", "rest", "eight" and "nine" put the usual defects into other trainings,
those in order are "healthy-crossed", "healthy-more", "healthy-eight" and "healthy-nine"; rules were mended on
"crossed", one on "elsewhere", and a few on "more", "rest" and "eight" once they had been run. "nine" and "healthy-nine"
were written without a look at the rules.
"""

import argparse
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _zoo import BROKEN, FRESH, HEALTHY, Case, Run, Training, bits, sigmoid_twice
from _zoo_crossed import CROSSED, ELSEWHERE, HEALTHY_CROSSED
from _zoo_crossed_eight import EIGHT, HEALTHY_EIGHT
from _zoo_crossed_more import HEALTHY_MORE, MORE, REST
from _zoo_crossed_nine import HEALTHY_NINE, NINE
from _zoo_last import HEALTHY_LAST, LAST
from _zoo_later import HEALTHY_LATER, LATER, broadcast
from _zoo_unseen import UNSEEN
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import (
    CriticalPointProbe,
    InitialLossCheck,
    InstabilityDetector,
    LearningCurves,
    OverfitCheck,
    UpdateRatioMonitor,
)
from lightning_recipes.callbacks.trials import seed_all
from lightning_recipes.core.findings import Finding
from lightning_recipes.sweep import diagnose

PARTS = {
    "broken": BROKEN,
    "fresh": FRESH,
    "later": LATER,
    "unseen": UNSEEN,
    "last": LAST,
    "crossed": CROSSED,
    "elsewhere": ELSEWHERE,
    "more": MORE,
    "rest": REST,
    "eight": EIGHT,
    "nine": NINE,
    "healthy": HEALTHY,
    "healthy-later": HEALTHY_LATER,
    "healthy-last": HEALTHY_LAST,
    "healthy-crossed": HEALTHY_CROSSED,
    "healthy-more": HEALTHY_MORE,
    "healthy-eight": HEALTHY_EIGHT,
    "healthy-nine": HEALTHY_NINE,
}
REGRESSION = (functional.mse_loss, functional.huber_loss, functional.smooth_l1_loss, functional.l1_loss, broadcast)
BINARY = functional.binary_cross_entropy_with_logits
SEVERITY = {"error": 0, "warning": 1, "info": 2}
ALL_IS_WELL = {"initial loss as expected", "overfits a small sample", "sharpness", "done", "cannot tell"}


def losses(module: Training, data: tuple[Tensor, Tensor]) -> list[float]:
    """Of up to 500 examples, in evaluation mode, in samples of ten."""
    criterion: Any = functional.mse_loss if module.loss in REGRESSION else BINARY
    criterion = criterion if data[1].is_floating_point() else functional.cross_entropy
    module.eval()
    with torch.no_grad():
        inputs = module.trainer.precision_plugin.convert_input(data[0][:500])
        chunks = zip(torch.split(inputs, 10), torch.split(data[1][:500], 10), strict=True)
        return [float(criterion(module(inputs), targets)) for inputs, targets in chunks]


def trained(run: Run, callbacks: Sequence[pl.Callback] = (), folder: str | None = None) -> None:
    """Train its module, which leaves nothing but what callbacks write into the folder."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=run.epochs,
        callbacks=[*callbacks],
        enable_model_summary=False,
        default_root_dir=folder,
        **quiet,
        **run.settings,
    )
    train = DataLoader(TensorDataset(*run.train), run.batch, shuffle=run.shuffle)
    trainer.fit(run.module, train, DataLoader(TensorDataset(*run.val), 500))


def diagnosed(run: Run, held_out: tuple[Tensor, Tensor] | None, larger: Callable[[], Run | None]) -> list[Finding]:
    """What the decision tree says of a classifier or a regression; where it asks for a larger network, it gets one."""
    module, targets = run.module, run.train[1]
    if not isinstance(module, Training) or module.loss in (bits, sigmoid_twice):
        return []
    regression = targets.is_floating_point() and module.loss in REGRESSION
    if targets.is_floating_point() and not regression and module.loss is not BINARY:
        return []
    counts = torch.ones(1) if regression else torch.bincount(targets.flatten().long()).double()
    prior = counts[counts > 0] / counts.sum()
    train, val = losses(module, run.train), losses(module, run.val)
    own = None if held_out is None else losses(module, held_out)
    if not all(map(math.isfinite, (*train, *val, *(own or ())))):
        return []
    trivial = float(targets.var() if regression else -(prior * prior.log()).sum())
    if trivial <= 0:
        return []
    inputs: dict[str, Any] = {"train_inputs": run.train[0], "val_inputs": run.val[0]} if own is None else {}
    inputs |= {"trivial_loss": trivial, "held_out_loss": own}
    diagnosis = diagnose(train, val, **inputs)
    if any("larger_train_loss" in each for each in diagnosis.cures) and (other := larger()) is not None:
        trained(other)
        assert isinstance(other.module, Training)  # as the smaller one
        of_larger = losses(other.module, other.train)
        if all(map(math.isfinite, of_larger)):
            diagnosis = diagnose(train, val, larger_train_loss=of_larger, **inputs)
    return [diagnosis.finding]


def without(run: Run) -> Run:
    """Trained on all but a hundred examples."""
    return replace(run, train=(run.train[0][:-100], run.train[1][:-100]))


def said(case: Case, seed: int) -> list[dict[str, Any]]:
    """The findings, the severer ones first."""
    seed_all(seed)
    run = case.make(seed)
    held_out = None
    if len(run.train[0]) > 500:  # a part is not trained on
        held_out = run.train[0][-100:], run.train[1][-100:]
        run = without(run)

    def larger() -> Run | None:
        if case.larger is None:
            return None
        seed_all(seed)
        other = case.larger(seed)
        return other if held_out is None else without(other)

    callbacks = [
        InitialLossCheck(),
        OverfitCheck(),
        InstabilityDetector(),
        UpdateRatioMonitor(),
        LearningCurves(),
        CriticalPointProbe(),
    ]
    with tempfile.TemporaryDirectory() as folder:
        trained(run, callbacks, folder)
        path = Path(folder) / "findings.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    found += [finding.as_dict() for finding in diagnosed(run, held_out, larger)]
    return sorted(found, key=lambda finding: SEVERITY[finding["severity"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--every", type=int, default=1, help="take one in so many, for a quick look")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="show every finding in full")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning_utilities.core.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for part, cases in PARTS.items():
        if options.parts and part not in options.parts:
            continue
        print(f"\n## {part}\n\n| training | right | findings |\n|---|---|---|", flush=True)
        right = of = 0
        for case in cases[:: options.every]:
            if not any(name in case.name for name in options.only):
                continue
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                findings = said(case, seed)
                severe = [finding["rule"] for finding in findings if finding["severity"] != "info"]
                rules = [finding["rule"] for finding in findings if finding["rule"] not in ALL_IS_WELL]
                first = [*dict.fromkeys(rules)][:2] if case.named else severe
                good = bool(case.named & {*first}) if case.named else not severe
                right, of = right + good, of + 1
                told = "; ".join(f"{finding['rule']} ({finding['severity']})" for finding in findings)
                print(f"| {case.name} | {'yes' if good else '**no**'} | {told} |", flush=True)
                for finding in findings if options.all else ():
                    print(f"    {finding['message']} {finding['advice']}")
        print(f"\n{right} of {of}", flush=True)


if __name__ == "__main__":
    main()
