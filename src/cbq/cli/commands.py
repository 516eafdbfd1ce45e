"""What `cbq` can be told to do."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from cbq.checkpoint import find_checkpoint
from cbq.cli.options import NOT_SETTINGS, check_combination, check_keys, conf_dir, flatten, quote
from cbq.cli.reproduce import Reproduction
from cbq.cli.stored import stored_group
from cbq.durable import disk_fault
from cbq.errors import InputError
from cbq.models.loading import LoadedModel, results_name
from cbq.report.command import report_folder
from cbq.report.runs import RunList
from cbq.results import environment, failure
from cbq.run_folder import CONFIG_NAME, RunFolder


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        config_name: its primary file in `conf/`.
        task: what it does with the composed configuration.
        argument: the option that a bare first word is a value of, if it takes one.
        fills_folder: hydra's output folder is its own, made for it.
        texts: options that are any text, which hydra would parse.
        flags: short words for options.
    """

    config_name: str
    task: Callable[[DictConfig], None]
    argument: str | None = None
    fills_folder: bool = False
    texts: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)

    def overrides(self, words: list[str]) -> list[str]:
        """Return what hydra is to be told for the words after the command's name; a path that is there is no option.

        Example:
            >>> Command("report", print, argument="folder").overrides(["multirun/it's", "x=1"])
            ["folder='multirun/it\\\\'s'", 'x=1']
            >>> Command("generate", print, texts=("prompt",)).overrides(["prompt=def f(x):", "seed=1"])
            ["prompt='def f(x):'", 'seed=1']
        """
        words = [self._quoted(word) for word in words]
        option = not words or words[0].startswith("-") or ("=" in words[0] and not Path(words[0]).exists())
        if not self.argument or option:
            return words
        return [f"{self.argument}={quote(words[0])}", *words[1:]]

    def _quoted(self, word: str) -> str:
        """Return an option that is a text in quotes; any other as it is."""
        key, _, value = word.partition("=")
        return f"{key}={quote(value)}" if key in self.texts and value else word


def quantize(config: DictConfig) -> None:
    """Quantize one model into the job's folder, unless this very run is finished there."""
    typed = list(HydraConfig.get().overrides.task)
    # What is typed for one start only; typed again by resume= it would throw away what there is to go on from.
    recorded = [word for word in typed if word.partition("=")[0].lstrip("+") not in ("overwrite", "save_state")]
    folder = RunFolder(Path(HydraConfig.get().runtime.output_dir), config, config.overwrite, recorded)
    if was_finished(folder):
        return
    if HydraConfig.get().mode is RunMode.MULTIRUN and "group" in config.tracking and config.tracking.group is None:
        config.tracking.group = sweep_name(HydraConfig.get().sweep.dir)
    choices = {key: choice for key, choice in HydraConfig.get().runtime.choices.items() if "/" not in key}
    settings = {key: choice for key, choice in choices.items() if choice is not None and key not in NOT_SETTINGS}
    runner = None
    with folder.held():
        if was_finished(folder):  # by another since
            return
        try:
            settings = flatten(config) | settings
            check_keys(config)
            check_combination(config, typed)
            runner = instantiate(config.runner, folder=folder, settings=settings)
            runner.run()
        except BaseException as error:
            if runner is not None and runner.results:
                with suppress(OSError):  # the disk that refused
                    runner.fail(error)
            elif HydraConfig.get().mode is RunMode.MULTIRUN and folder.is_free():  # a cell of a table, which shows it
                folder.start(failed_results(config, settings, error))
            begun = runner is not None and runner.results and runner.results["status"] != "finished"
            if begun and (isinstance(error, KeyboardInterrupt) or disk_fault(error)):
                print(f"cbq: to go on: cbq resume={shlex.quote(str(folder.path))}", file=sys.stderr)
            raise


def was_finished(folder: RunFolder) -> bool:
    """Return whether a run is finished in its folder, and say so; a state that was left there is removed."""
    if not folder.is_finished():
        return False
    if folder.state_path.exists():
        with suppress(InputError), folder.held():
            folder.remove_state()
    print(f"already finished: {folder.path} (overwrite=true starts anew)")
    return True


def sweep_name(folder: str) -> str:
    """Return what W&B calls the group of a sweep's runs: its folder, without hydra's own in front of it.

    Example:
        >>> sweep_name("multirun/table3c"), sweep_name("multirun/2024-01-01/12-00-00"), sweep_name("/data/sweeps/mine")
        ('table3c', '2024-01-01/12-00-00', 'mine')
    """
    path = Path(folder)
    return str(path.relative_to("multirun")) if path.is_relative_to("multirun") else path.name


def failed_results(config: DictConfig, settings: dict, error: BaseException) -> dict:
    """Return what `results.json` says of a run that failed before there was a model to name."""
    path = settings.get("model.path")
    return {
        "status": "failed",
        "error": failure(error),
        "model": results_name(path, settings.get("model.name")) if isinstance(path, str) else settings["model"],
        "scheme": settings["quant"].upper(),
        "method": settings["method"],
        "seed": config.seed if isinstance(config.seed, int) else 0,
        "settings": settings,
        "environment": environment("cpu"),  # nothing was computed
    }


def evaluate(config: DictConfig) -> None:
    """Measure a checkpoint, a model, or one against the other; the figures go into the job's folder."""
    check_keys(config, "evaluate")
    folder = Path(HydraConfig.get().runtime.output_dir)
    instantiate(config.evaluator, folder=folder, settings=flatten(config)).run()


def analyze(config: DictConfig) -> None:
    """Measure what depends on what in a model, and which linears need more bits; all goes into the job's folder."""
    check_keys(config, "analyze")
    job = HydraConfig.get()
    typed = [word for word in job.overrides.task if re.match(r"(model|quant)\.", word.lstrip("+"))]
    command = shlex.join(
        ["cbq", *(f"{group}={job.runtime.choices.get(group)}" for group in ("model", "quant")), *typed]
    )
    folder = Path(job.runtime.output_dir)
    instantiate(config.analyzer, folder=folder, settings=flatten(config), command=command).run()


def report(config: DictConfig) -> None:
    """Write the report of a run's or a sweep's folder."""
    experiments = sorted(path.stem for path in (Path(conf_dir()) / "experiment").glob("*.yaml"))
    report_folder(config.folder, experiments)


def reproduce(config: DictConfig) -> None:
    """Run a finished run again, and compare."""
    check_keys(config, "reproduce")
    Reproduction(config.folder, config.out).run()


def runs(config: DictConfig) -> None:
    """List the finished runs below a folder."""
    check_keys(config, "runs")
    RunList(config.folder, config.sort).run()


def export(config: DictConfig) -> None:
    """Write a checkpoint in the format of an engine."""
    check_keys(config, "export")
    run_config = find_checkpoint(config.checkpoint).parent / CONFIG_NAME

    def load_base() -> LoadedModel:
        return instantiate(stored_group(run_config, "model"))()

    known = load_base if run_config.is_file() else None
    instantiate(config.command, checkpoint=config.checkpoint, load_base=known).run()


def generate(config: DictConfig) -> None:
    """Continue a prompt, beside the model that a run started from if that is wanted."""
    check_keys(config, "generate")
    load_base = None
    run_config = find_checkpoint(config.checkpoint).parent / CONFIG_NAME
    if config.compare and run_config.is_file():
        load_base = instantiate(stored_group(run_config, "model"))
    instantiate(config.command, checkpoint=config.checkpoint, prompt=config.prompt, load_base=load_base).run()


COMMANDS = {
    "quantize": Command(
        "config", quantize, fills_folder=True, flags={"-q": "verbosity=quiet", "-v": "verbosity=verbose"}
    ),
    "evaluate": Command("evaluate", evaluate, argument="checkpoint", fills_folder=True),
    "analyze": Command("analyze", analyze, fills_folder=True),
    "export": Command("export", export, argument="checkpoint"),
    "generate": Command("generate", generate, argument="checkpoint", texts=("prompt",)),
    "reproduce": Command("reproduce", reproduce, argument="folder"),
    "report": Command("report", report, argument="folder"),
    "runs": Command("runs", runs, argument="folder"),
}
