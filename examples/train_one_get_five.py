"""Train one network, get five: snapshots of a cyclic learning rate beside a single run of the same length.

python examples/train_one_get_five.py [--steps 1500] [--seeds 3] [--wrong-labels 0.15] [--restart 0.2]

On 300 digits. With --wrong-labels 0 --restart 0.1 the network interpolates its data, the snapshots do not differ, and
the report says that nothing is gained.
"""

import argparse
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from _data import Data, digits
from digits import DigitClassifier
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import LearningRateSchedule, SnapshotEnsemble


def trained(data: Data, seed: int, steps: int, learning_rate: float, recipe: pl.Callback) -> tuple[float, float]:
    """Error and loss on the test data."""
    pl.seed_everything(seed, verbose=False)
    images, labels = data.train
    train, val, test = TensorDataset(images[:300], labels[:300]), TensorDataset(*data.val), TensorDataset(*data.test)
    model = DigitClassifier(learning_rate, glitches=0.0)
    model.test_step = model.validation_step  # type: ignore[method-assign]  # of this one
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[recipe],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        trainer.fit(model, DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(val, 300))
        (scores,) = trainer.test(model, DataLoader(test, 599), verbose=False)
    return scores["val_error"], scores["val_loss"]


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

    scores: dict[str, list[tuple[float, float]]] = {"one cosine": [], "5 snapshots": []}
    for seed in range(options.seeds):
        data = digits(seed, options.wrong_labels)
        snapshots = SnapshotEnsemble(cycles=5, evaluate=True)
        single = LearningRateSchedule("cosine")
        scores["one cosine"].append(trained(data, seed, options.steps, 0.1, single))
        scores["5 snapshots"].append(trained(data, seed, options.steps, options.restart, snapshots))
    print(f"{data.name}, 300 to train; {options.steps} updates, {options.seeds} seeds")
    for name, each in scores.items():
        error, loss = torch.tensor(each).mean(0)
        print(f"{name:12} test error {error:.1%}, loss {loss:.3f}")
    assert snapshots.report is not None
    print(f"\nThe last seed's report:\n\n{snapshots.report.to_markdown()}")


if __name__ == "__main__":
    main()
