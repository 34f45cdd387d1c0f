"""Do the recipes help? Four trainings on handwritten digits: with nothing, with each recipe, with both.

python examples/do_the_recipes_help.py [--seeds 2] [--epochs 15] [--folder demo]
"""

import argparse
import logging
import shlex
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from digits import DigitClassifier, Digits
from lightning.pytorch.cli import LightningCLI

HERE = Path(__file__).parent
CLIPPING = ["--trainer.callbacks+=lightning_recipes.PercentileGradientClipping"]
AVERAGING = ["--trainer.callbacks+=lightning_recipes.EMAWeights", "--trainer.callbacks.decay=0.99"]
RUNS = {
    "nothing": [],
    "EMAWeights": AVERAGING,
    "PercentileGradientClipping": CLIPPING,
    "both": [*CLIPPING, *AVERAGING],
}


def train(name: str, seed: int, epochs: int, folder: Path) -> dict[str, float]:
    """Train once through LightningCLI, as from the command line; return the last validation's metrics."""
    arguments = [
        *("fit", "--config", str(HERE / "digits.yaml"), f"--seed_everything={seed}"),
        *(f"--trainer.max_epochs={epochs}", "--trainer.enable_progress_bar=false"),
        *("--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={folder}"),
        *(f"--trainer.logger.name={name}", f"--trainer.logger.version=seed_{seed}"),
        *RUNS[name],
    ]
    cli = LightningCLI(DigitClassifier, Digits, args=arguments, save_config_kwargs={"overwrite": True})
    metrics: dict[str, Any] = cli.trainer.callback_metrics
    return {key: float(value) for key, value in metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the logs go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    sys.argv = sys.argv[:1]  # LightningCLI is to read its arguments only

    print(f"{Digits().data.name}; learning rate 0.05, one batch in fifty a glitch; {options.epochs} epochs")
    print(f"\n{'recipe':28}{'test error':>12}{'test loss':>12}{'clipped':>12}   (mean of {options.seeds} trainings)")
    for name in RUNS:
        ends = [train(name, seed, options.epochs, options.folder) for seed in range(options.seeds)]
        error, loss, clipped = (
            statistics.fmean(end.get(key, 0.0) for end in ends) for key in ("val_error", "val_loss", "clipped_fraction")
        )
        print(f"{name:28}{error:>12.1%}{loss:>12.3f}{clipped:>12.1%}", flush=True)
    print(
        f"\nCurves, and the figure of gradient norms under IMAGES:\n"
        f"    {shlex.quote(sys.executable)} -m tensorboard.main --logdir {shlex.quote(str(options.folder))}"
    )
    for findings in sorted(options.folder.rglob("findings.jsonl")):
        print(f"What was noticed: {findings}")


if __name__ == "__main__":
    main()
