"""The command line: one dataclass a verb, whose fields are its flags and whose docstrings are its help.

Heavy libraries are imported inside the verbs, so that ``tmca --help`` answers at once.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from tmca.cli.catalogue import ModelsConvert, ModelsInstall, ModelsList, ModelsVerify, PresetsList, PresetsShow
from tmca.cli.data import DataAudit, DataCorrect, DataDescribe, DataImport, DataPhantom, DataSplit
from tmca.cli.export import ExportBundle, ExportONNX, ExportOpenVINO
from tmca.cli.health import Doctor, Info
from tmca.cli.options import show
from tmca.cli.reports import ReportToPrompt
from tmca.cli.reproduction import Reproduce
from tmca.cli.results import Bench, BenchPrompts, Calibrate, Compare
from tmca.cli.server import Serve
from tmca.cli.verbs import Demo, Evaluate, Predict, Train
from tmca.config import Experiment, from_dict
from tmca.errors import EXIT_INTERRUPTED, ConfigError, TMCAError, unknown_name
from tmca.presets import PRESETS, get_preset
from tmca.progress import set_quiet

VERBS: dict[str, Any] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "serve": Serve,
    "calibrate": Calibrate,
    "report-to-prompt": ReportToPrompt,
    "compare": Compare,
    "reproduce": Reproduce,
    "bench": Bench,
    "bench prompts": BenchPrompts,
    "data import": DataImport,
    "data audit": DataAudit,
    "data correct": DataCorrect,
    "data describe": DataDescribe,
    "data split": DataSplit,
    "data phantom": DataPhantom,
    "presets list": PresetsList,
    "presets show": PresetsShow,
    "models list": ModelsList,
    "models convert": ModelsConvert,
    "models install": ModelsInstall,
    "models verify": ModelsVerify,
    "export onnx": ExportONNX,
    "export openvino": ExportOpenVINO,
    "export bundle": ExportBundle,
    "info": Info,
    "doctor": Doctor,
}

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Variables by which libraries are told to report nothing home; a value that the user set stays."""

EXTRAS = {
    "export": ("onnx", "onnxruntime", "onnxscript", "openvino"),
    "serve": ("fastapi", "fastapi_offline", "gradio", "multipart", "prometheus_client", "starlette", "uvicorn"),
}
"""Extra of the package → what it installs and verbs import late; everything else is in ``train``."""

OPTIONS_FLAG = "--model.options"

GLOBAL_FLAGS = {
    "-q": "quiet",
    "--quiet": "quiet",
    "-v": "verbose",
    "--verbose": "verbose",
    "--debug": "debug",
    "--offline": "offline",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; see ``docs/reference/cli.md`` for the codes."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; a user's mistake is one line on stderr, never a traceback."""
    flags = {GLOBAL_FLAGS[argument] for argument in arguments if argument in GLOBAL_FLAGS}
    arguments = [argument for argument in arguments if argument not in GLOBAL_FLAGS]
    _prepare_environment(offline="offline" in flags)
    _prepare_logging(verbose="verbose" in flags)
    set_quiet(quiet="quiet" in flags)
    try:
        return _execute(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except SystemExit as error:  # tyro prints its own help and usage errors
        return error.code if isinstance(error.code, int) else ConfigError.exit_code
    except Exception as error:
        if "debug" in flags:
            traceback.print_exc()
        message, code = _explain(error)
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", markup=False)
        return code
    finally:
        set_quiet(quiet=False)


def _execute(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        show(usage())
        return 0 if arguments else ConfigError.exit_code
    if arguments[0] == "--version":
        show(_version())
        return 0
    verb, rest = _verb(arguments)
    _parse(verb, rest).run()
    return 0


def _explain(error: Exception) -> tuple[str, int]:
    """Return the line a user reads and the exit code."""
    if isinstance(error, TMCAError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), "train")
        return f"This verb needs the package {error.name!r} (pip install 'tmca[{extra}]')", TMCAError.exit_code
    if isinstance(error, OSError):
        where = error.filename or ""
        if not where and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f"where it is written, or in {os.environ.get('TMPDIR', '/tmp')} (TMPDIR names another folder)"
        what = f"{error.strerror or error}: {where}"
        return f"{what} (check the path, its permissions and the free space)", TMCAError.exit_code
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {message} (this is a fault of tmca; --debug shows where)", TMCAError.exit_code


def usage() -> str:
    """Return the list of verbs."""
    lines = ["Language-guided medical image segmentation.", "", "usage: tmca VERB [flags]", ""]
    for verb, command in VERBS.items():
        lines.append(f"  {verb:16} {(command.__doc__ or '').splitlines()[0].partition(': `')[0].rstrip('.')}")
    lines += [
        "",
        "`tmca VERB --help` lists the flags of a verb.",
        "Everywhere: -q/--quiet, -v/--verbose, --offline, --debug; `tmca --version`.",
        "Research only; not a medical device.",
    ]
    return "\n".join(lines)


def _verb(arguments: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        verb = " ".join(arguments[:words])
        if verb in VERBS:
            return verb, arguments[words:]
    groups = {verb.split()[0] for verb in VERBS if " " in verb}
    if arguments[0] in groups:
        chosen = [verb for verb in VERBS if verb.startswith(f"{arguments[0]} ")]
        if len(arguments) < 2 or arguments[1].startswith("-"):
            raise ConfigError(f"`tmca {arguments[0]}` needs one of: {', '.join(chosen)}", hint="see tmca --help")
        raise unknown_name("verb", " ".join(arguments[:2]), chosen)
    raise unknown_name("verb", arguments[0], VERBS)


def _parse(verb: str, rest: list[str]) -> Any:  # noqa: ANN401
    if verb != "train":
        return tyro.cli(VERBS[verb], args=rest, prog=f"tmca {verb}")
    preset, rest = _split_preset(rest)
    chosen = get_preset(preset)
    experiment, rest = _with_options(_of_the_run(rest, preset) or chosen, rest)
    return tyro.cli(Train, args=rest, prog=f"tmca train {preset}", default=Train(experiment))


def _of_the_run(rest: list[str], preset: str) -> Experiment | None:
    """Return the settings of the run that shall go on: what the command line leaves out is as it was.

    Raises:
        ConfigError: It is a run of another preset.
    """
    given = dict(itertools.pairwise([part for argument in rest for part in argument.split("=", 1)]))
    if given.get("--resume") != "last":
        return None
    folder = Path(given.get("-o", given.get("--output", f"runs/{preset}")))
    try:
        experiment = from_dict(Experiment, json.loads((folder / "experiment.json").read_text("utf-8")))
    except (OSError, ValueError):
        return None  # training says what is missing
    if experiment.name != preset and experiment.name in PRESETS and "--name" not in given:
        raise ConfigError(
            f"The run in {folder} is one of {experiment.name}, not of {preset}",
            hint=f"tmca train {experiment.name} … --resume last",
        )
    return experiment


def _with_options(experiment: Experiment, rest: list[str]) -> tuple[Experiment, list[str]]:
    """Read ``--model.options JSON``: its fields are the method's, which the parser does not know."""
    for position, argument in enumerate(rest):
        flag, equals, text = argument.partition("=")
        if flag != OPTIONS_FLAG:
            continue
        if not equals:
            text = rest[position + 1] if position + 1 < len(rest) else ""
        try:
            options = json.loads(text)
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise ConfigError(
                f"{OPTIONS_FLAG} is {text!r}, expected a JSON object", hint="for example '{\"width\": 32}'"
            )
        model = replace(experiment.model, options=experiment.model.options | options)
        return replace(experiment, model=model), rest[:position] + rest[position + (1 if equals else 2) :]
    return experiment, rest


def _split_preset(rest: list[str]) -> tuple[str, list[str]]:
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    if any(argument in ("-h", "--help") for argument in rest):
        return "tmca", rest
    raise ConfigError(f"`tmca train` needs a preset: {', '.join(PRESETS)}", hint="see tmca presets list")


def _prepare_environment(*, offline: bool) -> None:
    """Switch telemetry off and honour offline mode before any library reads its environment."""
    for name, value in {**NO_TELEMETRY, "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    if offline or os.environ.get("TMCA_OFFLINE", "").lower() in ("1", "true", "yes"):
        os.environ["TMCA_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"


def _prepare_logging(*, verbose: bool) -> None:
    """Show what the libraries log on stderr, from the level ``TMCA_LOG_LEVEL`` or, when verbose, from INFO."""
    level = logging.getLevelNamesMapping().get(os.environ.get("TMCA_LOG_LEVEL", "").upper(), logging.WARNING)
    logging.basicConfig(level=min(level, logging.INFO) if verbose else level, format="%(name)s: %(message)s")


def _version() -> str:
    from importlib.metadata import version

    return f"tmca {version('tmca')}"
