"""Where figures, histograms and texts can be shown: each logger in its own way, and files for those that show none."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning_recipes.core.files import put, replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Bin = tuple[float, float, int]  # lower edge, upper edge, count
MOST_BINS = 512  # that W&B takes


class Outlet(Protocol):
    """Shows what is no scalar; ``step`` is that of Lightning's own metrics."""

    def figure(self, name: str, figure: "Figure", step: int) -> None: ...

    def histogram(self, name: str, bins: Sequence[Bin], step: int) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...


class TensorBoard:
    """The writer of a TensorBoardLogger."""

    def __init__(self, logger: Any) -> None:
        self.writer = logger.experiment

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self.writer.add_figure(name, figure, step)

    def histogram(self, name: str, bins: Sequence[Bin], step: int) -> None:
        bins = closed(bins)
        middles = [((low + high) / 2, count) for low, high, count in bins]
        self.writer.add_histogram_raw(
            name,
            min=bins[0][0],
            max=bins[-1][1],
            num=sum(count for _, count in middles),
            sum=sum(middle * count for middle, count in middles),
            sum_squares=sum(middle**2 * count for middle, count in middles),
            bucket_limits=[high for _, high, _ in bins],
            bucket_counts=[count for _, count in middles],
            global_step=step,
        )

    def text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, text, step)


class WeightsAndBiases:
    """A WandbLogger, whose own methods know the x-axis."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self.logger.log_image(name, [figure], step)

    def histogram(self, name: str, bins: Sequence[Bin], step: int) -> None:
        import wandb

        bins = closed(bins)
        while len(bins) > MOST_BINS:
            bins = [_joined(bins[place : place + 2]) for place in range(0, len(bins), 2)]
        edges = [bins[0][0], *(high for _, high, _ in bins)]
        drawn = wandb.Histogram(np_histogram=([count for _, _, count in bins], edges))
        self.logger.log_metrics({f"{name}_histogram": drawn}, step)  # a chart of scalars may have the name itself

    def text(self, name: str, text: str, step: int) -> None:
        self.logger.log_text(name, ["text"], [[text]], step=step)


class MLflow:
    """The artifacts of an MLFlowLogger's run."""

    def __init__(self, logger: Any) -> None:
        self.client, self.run_id = logger.experiment, logger.run_id

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self.client.log_figure(self.run_id, figure, f"{name}.png")

    def histogram(self, name: str, bins: Sequence[Bin], step: int) -> None:
        self.client.log_text(self.run_id, _as_csv(bins), f"{name}.csv")

    def text(self, name: str, text: str, step: int) -> None:
        self.client.log_text(self.run_id, text, f"{name}.md")


class Files:
    """Files in the run's folder; a newer one takes the place of the older."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        with replaced(self._path(name, "png")) as file:
            figure.savefig(file, format="png", dpi=120)

    def histogram(self, name: str, bins: Sequence[Bin], step: int) -> None:
        put(self._path(name, "csv"), _as_csv(bins))

    def text(self, name: str, text: str, step: int) -> None:
        put(self._path(name, "md"), text + "\n")

    def _path(self, name: str, ending: str) -> Path:
        return self.folder / f"{name.replace('/', '_')}.{ending}"


def outlet_of(logger: Any) -> Outlet | None:
    """How a logger shows what is no scalar, by what it can do rather than by its class; None if it does not."""
    if callable(getattr(logger, "log_image", None)):
        return WeightsAndBiases(logger)
    experiment = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_figure", None)):
        return TensorBoard(logger)
    if callable(getattr(experiment, "log_figure", None)) and hasattr(logger, "run_id"):
        return MLflow(logger)
    return None


def closed(bins: Sequence[Bin]) -> list[Bin]:
    """Bins with nothing between them: what is empty has a bin, and one without width reaches to the next.

    Example:
        >>> closed([(0.0, 0.0, 2), (1.0, 2.0, 5), (4.0, 8.0, 1)])
        [(0.0, 1.0, 2), (1.0, 2.0, 5), (2.0, 4.0, 0), (4.0, 8.0, 1)]
    """
    whole: list[Bin] = []
    for low, high, count in bins:
        if whole and whole[-1][0] == whole[-1][1]:
            whole[-1] = (whole[-1][0], low, whole[-1][2])
        elif whole and whole[-1][1] < low:
            whole.append((whole[-1][1], low, 0))
        whole.append((low, high, count))
    return whole


def _joined(bins: Sequence[Bin]) -> Bin:
    return bins[0][0], bins[-1][1], sum(count for _, _, count in bins)


def _as_csv(bins: Sequence[Bin]) -> str:
    rows = ["lower,upper,count", *(",".join(map(repr, each)) for each in bins)]
    return "\n".join([*rows, ""])
