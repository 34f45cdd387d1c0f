"""What gradient_clip_val should I set? Measure a run without clipping it, and read the recommendation.

python examples/what_gradient_clip_val.py [--epochs 15]
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits import DigitClassifier, Digits
from lightning.pytorch.loggers import CSVLogger

from lightning_recipes import PercentileGradientClipping


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path("clip_val"), help="where the log goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    pl.seed_everything(0, verbose=False)

    logger = CSVLogger(options.folder)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[PercentileGradientClipping(measure_only=True)],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitClassifier(glitches=0.0), Digits())

    finding = json.loads((Path(logger.log_dir) / "findings.jsonl").read_text().splitlines()[-1])
    print(finding["message"], finding["advice"], sep="\n")
    print(f"The figure: {Path(logger.log_dir) / 'grad_norm.png'}")


if __name__ == "__main__":
    main()
