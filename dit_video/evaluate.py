"""dit-video evaluate: every metric of an evaluation on a run, into its evaluation.json and report.html."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from dit_video.build import make
from dit_video.eval.judge import Evaluation
from dit_video.runs import LOCATIONS, Run
from dit_video.sampler.generate import Sampler


def main(config: DictConfig) -> None:
    """Evaluates a run and prints what was found."""
    run = open_run(config)
    result = run.evaluate(config.eval, chosen_sampler(run, config))
    print_metrics(result)
    Console().print(f"{run.folder}/evaluation.json and {run.folder}/report.html")


def open_run(config: DictConfig) -> Run:
    """The run that the command line names, with frozen weights from where it says that they lie."""
    inside = [f"text.encoders.{name}.{key}" for name, own in config.text.encoders.items() for key in own]
    folders = {key: str(place) for key in (*LOCATIONS, *inside) if (place := OmegaConf.select(config, key)) is not None}
    return Run(Path(config.run), trust=config.get("trust", ()), folders=folders, dtype=config.dtype)


def chosen_sampler(run: Run, config: DictConfig) -> Sampler:
    """The run's own sampler, but for what the command line says."""
    keys = ("steps", "guidance", "interval", "rescale", "shift", "precision", "batch_size")
    changes: dict[str, Any] = {key: config[key] for key in keys if config.get(key) is not None}
    said = config.get("sampler") or DictConfig({})
    if "_target_" in said:
        return replace(make(said), **changes)
    changes |= {part: make(said[part]) for part in ("solver", "schedule") if said.get(part)}
    return replace(run.sampler, **changes)


def print_metrics(result: Evaluation) -> None:
    """A table of every metric with its interval and count."""
    table = Table("metric", "value", "95% interval", "count")
    for name, estimate in result.metrics.items():
        table.add_row(name, f"{estimate.value:.4g}", f"{estimate.low:.4g} to {estimate.high:.4g}", str(estimate.count))
    Console().print(table)
