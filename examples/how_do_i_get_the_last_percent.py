"""How do I get the last percent? An average of the weights, a schedule, or an ensemble, for one training's budget.

python examples/how_do_i_get_the_last_percent.py [--steps 1500] [--seeds 3] [--wrong-labels 0.15] [--restart 0.2]

On digits, some of them with a wrong label. In small batches: the average against the noise of a constant learning rate,
and under a cosine, where the average and the last weights are the same model. With few examples, which are learnt by
heart: five snapshots against one cosine. With --wrong-labels 0 --restart 0.1 the snapshots do not differ, and the
report says that nothing is gained.
"""

import argparse
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from _data import Data, digits
from digits import DigitClassifier
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import EMAWeights, LearningRateSchedule, SnapshotEnsemble

Scores = list[tuple[float, float]]  # error and loss on the test data


def trained(data: Data, seed: int, steps: int, batch_size: int, learning_rate: float, *recipes: pl.Callback) -> Scores:
    """Of the model that fit leaves; and of the raw weights, if there is an average."""
    pl.seed_everything(seed, verbose=False)
    train, val, test = (TensorDataset(*part) for part in (data.train, data.val, data.test))
    model = DigitClassifier(learning_rate, glitches=0.0)
    model.test_step = model.validation_step  # type: ignore[method-assign]  # of this one
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            check_val_every_n_epoch=10,
            callbacks=[*recipes],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        trainer.fit(model, DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(val, 300))
        tests = DataLoader(test, 599)
        scores = trainer.test(model, tests, verbose=False)
        for recipe in recipes:
            if isinstance(recipe, EMAWeights):
                with recipe.raw_weights(model):
                    scores += trainer.test(model, tests, verbose=False)
    return [(each["val_error"], each["val_loss"]) for each in scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--wrong-labels", type=float, default=0.15)
    parser.add_argument("--restart", type=float, default=0.2, help="learning rate at which a cycle starts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    rows: list[Scores] = []
    for seed in range(options.seeds):
        data = digits(seed, options.wrong_labels)
        few = replace(data, train=(data.train[0][:300], data.train[1][:300]))
        snapshots = SnapshotEnsemble(cycles=5, evaluate=True)
        average, constant = trained(data, seed, options.steps, 8, 0.05, EMAWeights())
        cosine = LearningRateSchedule("cosine")
        decayed_average, decayed = trained(data, seed, options.steps, 8, 0.05, cosine, EMAWeights())
        (single,) = trained(few, seed, options.steps, 32, 0.1, LearningRateSchedule("cosine"))
        (ensemble,) = trained(few, seed, options.steps, 32, options.restart, snapshots)
        rows.append([constant, average, decayed, decayed_average, single, ensemble])
    print(f"{data.name}; {options.steps} updates, mean of {options.seeds} trainings")
    print(f"{'':40}{'test error':>12}{'test loss':>12}")
    names = (
        *("batches of 8, constant", "batches of 8, constant, EMAWeights"),
        *("batches of 8, cosine", "batches of 8, cosine, EMAWeights"),
        *("300 examples, cosine", "300 examples, SnapshotEnsemble"),
    )
    for name, (error, loss) in zip(names, torch.tensor(rows).mean(0).tolist(), strict=True):
        print(f"{name:40}{error:>12.1%}{loss:>12.3f}")
    assert snapshots.report is not None
    print(f"\nThe last seed's report:\n\n{snapshots.report.to_markdown()}")


if __name__ == "__main__":
    main()
