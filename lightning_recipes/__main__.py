"""``python -m lightning_recipes report RUN_DIR``: one page of a run, finished or killed, with or without recipes."""

import argparse
import sys
import time
from pathlib import Path

from lightning_recipes.report.page import write
from lightning_recipes.report.reading import NoRun, find_run, read_run


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lightning_recipes", description="The recipes' command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report",
        help="write report.html and report.md of a run",
        description="Write report.html and report.md from the files of a Lightning run: TensorBoard events,"
        " metrics.csv, hparams.yaml, findings.jsonl.",
    )
    report.add_argument(
        "folder", metavar="RUN_DIR", type=Path, help="such as lightning_logs/version_0, or one above it"
    )
    report.add_argument("--output", metavar="DIR", type=Path, help="where to write; default: the run's folder")
    asked = parser.parse_args(arguments)
    try:
        folder, runs = find_run(asked.folder)
        output = folder if asked.output is None else asked.output
        output.mkdir(parents=True, exist_ok=True)
        if runs > 1:
            print(f"The newest of {runs} runs: {folder}")
        print(write(read_run(folder), output, f"read {time.strftime('%Y-%m-%d %H:%M')}"))
    except (NoRun, OSError) as error:
        print(f"{parser.prog} report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
