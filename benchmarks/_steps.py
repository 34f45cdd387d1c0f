"""What callbacks add to a whole step of Lightning."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_recipes

Batch = tuple[Tensor, Tensor]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "EarlyStopping": {"monitor": "val_loss", "strict": False},
    "SnapshotEnsemble": {"cycles": 2},
}
BEFORE = {"InitialLossCheck", "OverfitCheck", "WarmupSweep"}  # training starts: nothing in a step, and long trials
SIX = (
    "PercentileGradientClipping",
    "EMAWeights",
    "InstabilityDetector",
    "EarlyStopping",
    "LearningRateSchedule",
    "SnapshotEnsemble",
)
EVERY = [
    name
    for name in lightning_recipes.__all__
    if issubclass(getattr(lightning_recipes, name), pl.Callback) and name not in BEFORE
]


class Transformer(nn.Module):
    """Ten million parameters: six layers of width 368."""

    def __init__(self, vocabulary: int = 512, width: int = 368, length: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(self.tokens(tokens) + self.places, mask=self.mask))
        return found.flatten(0, 1)


def perceptron() -> nn.Module:
    """2,400 parameters: nearly nothing but the loop's own cost."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def pictures() -> list[Batch]:
    return [(torch.rand(32, 64), torch.randint(10, (32,))) for _ in range(56)]


def texts(batch_size: int) -> list[Batch]:
    return [(torch.randint(512, (batch_size, 16)), torch.randint(512, (batch_size * 16,))) for _ in range(8)]


class Batches(torch.utils.data.Dataset[Any]):
    """Whole batches, so that collating does not hide the cost of the loop."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    @override
    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


class Task(pl.LightningModule):
    """Notes the CPU time at which each step begins."""

    def __init__(self, net: nn.Module, logs: bool) -> None:
        super().__init__()
        self.net, self.logs = net, logs
        self.stamps: list[float] = []

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.stamps.append(time.process_time())
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.logs:
            self.log("train_loss", loss)
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.logs:
            self.log_dict(grad_norm(self, 2))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Silent(Logger):
    """Takes everything and writes nothing."""

    name = version = "none"

    @override
    def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


Settings = Callable[[], dict[str, Any]]


def recipes(*names: str) -> Settings:
    """Settings of a Trainer with these recipes."""
    return lambda: {"callbacks": [getattr(lightning_recipes, name)(**ARGUMENTS.get(name, {})) for name in names]}


def own_equivalents() -> dict[str, Any]:
    """What Lightning has for the same jobs: an average, clipping, early stopping, and curves of norms and rates."""
    callbacks = [
        theirs.EMAWeightAveraging(decay=0.999),
        theirs.EarlyStopping("train_loss", patience=10**6, check_on_train_epoch_end=True),
        theirs.LearningRateMonitor("step"),
    ]
    return {"callbacks": callbacks, "gradient_clip_val": 1.0, "logger": Silent(), "log_every_n_steps": 1}


ALL_OF_OURS, THEIRS = f"all {len(EVERY)} of the library", "Lightning's own for the same jobs"


def some_kinds() -> dict[str, Settings]:
    return {"no callback": dict, ALL_OF_OURS: recipes(*EVERY), THEIRS: own_equivalents}


def all_kinds() -> dict[str, Settings]:
    return {
        "no callback": dict,
        "empty callback": lambda: {"callbacks": [pl.Callback()]},
        **{name: recipes(name) for name in EVERY},
        "InstabilityDetector and clipping": recipes("InstabilityDetector", "PercentileGradientClipping"),
        f"the {len(SIX)} that change a training": recipes(*SIX),
        ALL_OF_OURS: recipes(*EVERY),
        f"{len(EVERY)} empty callbacks": lambda: {"callbacks": [pl.Callback() for _ in EVERY]},
        "Lightning: gradient_clip_val": lambda: {"gradient_clip_val": 1.0},
        "Lightning: EMAWeightAveraging": lambda: {"callbacks": [theirs.EMAWeightAveraging()]},
        THEIRS: own_equivalents,
    }


def steps_of(net: nn.Module, batches: list[Batch], steps: int, settings: Mapping[str, Any], logs: bool) -> list[float]:
    """CPU seconds of each step of a fit but the first five, or the first quarter."""
    task = Task(net, logs)
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": -1,
            "default_root_dir": tempfile.gettempdir(),
            **dict.fromkeys(silent, False),
            **settings,
        }
    )
    trainer.fit(task, DataLoader(Batches(batches), batch_size=None))
    skipped = min(5, steps // 4)
    return [after - before for before, after in zip(task.stamps[skipped:], task.stamps[skipped + 1 :], strict=False)]


def measure(
    title: str, net: Callable[[], nn.Module], batches: list[Batch], steps: int, kinds: dict[str, Settings], time_: float
) -> None:
    """What is added to a step, paired within a round of fits.

    The least disturbed tenth of the steps of a fit; and the mean of all but the slowest twentieth, in which what is
    done at every so many steps is seen, and whatever else the machine does.
    """
    fast: dict[str, list[float]] = {kind: [] for kind in kinds}
    mean: dict[str, list[float]] = {kind: [] for kind in kinds}
    names, order, end = list(kinds), random.Random(0), time.perf_counter() + time_
    while time.perf_counter() < end or len(fast["no callback"]) < 5:
        order.shuffle(names)
        for name in names:
            torch.manual_seed(0)
            taken = sorted(steps_of(net(), batches, steps, kinds[name](), name == THEIRS))
            fast[name].append(taken[len(taken) // 10])
            mean[name].append(statistics.fmean(taken[: max(1, 19 * len(taken) // 20)]))
    bare = 1e6 * statistics.median(fast["no callback"])
    print(f"\nA step of Lightning, {title}, {bare:,.0f} microseconds here; {len(fast['no callback'])} fits of each")
    print(f"{'':36}{'added':>10}{'share':>8}{'of the mean':>14}")
    for name in kinds:
        added = 1e6 * statistics.median(map(float.__sub__, fast[name], fast["no callback"]))
        share, whole = (
            statistics.median(one / other - 1 for one, other in zip(values[name], values["no callback"], strict=True))
            for values in (fast, mean)
        )
        print(f"{name:36}{added:>10,.0f}{share:>8.1%}{whole:>14.1%}")


def measure_steps(seconds: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure("2,400 parameters", perceptron, pictures(), 400, all_kinds(), 4 * seconds)
    for batch_size, steps in ((2, 24), (32, 12)):
        title = f"a transformer of ten million parameters, batch {batch_size}"
        measure(title, Transformer, texts(batch_size), steps, some_kinds(), 4 * seconds)
