"""The command line: one dataclass a verb, whose fields are its flags and whose docstrings are its help.

Heavy libraries are imported inside the verbs, so that ``tmca --help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from tmca.config import Experiment, to_dict
from tmca.errors import EXIT_INTERRUPTED, ConfigError, DataError, PartialFailureError, TMCAError, unknown_name
from tmca.presets import PRESETS, describe_preset, get_preset
from tmca.progress import say, set_quiet

Model = Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="RUN")]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
Device = Annotated[str, tyro.conf.arg(aliases=["-d"], metavar="{auto,cpu,cuda,cuda:N,mps}")]
PromptLevel = Annotated[str, tyro.conf.arg(metavar="p0…p9")]


@dataclass(frozen=True)
class Demo:
    """Draw phantoms, train a small TMCA on them, and show that the sentence steers the mask."""

    output: Output = Path("demo")
    """Folder for data, run and report."""
    seed: int = 1
    """Seed of drawing and training."""

    def run(self) -> None:
        """Run the demo and print its table."""
        from tmca.demo import run_demo
        from tmca.report import score_table

        evaluation, result = run_demo(self.output, seed=self.seed)
        _print(score_table(evaluation, "Held-out phantoms"))
        took = sum(result["seconds"].values())
        _print(
            f"{took:.0f} seconds. Report with pictures: {self.output / 'report.html'}; trained model: {result['run']}"
        )


@dataclass(frozen=True)
class Train:
    """Train a model: `tmca train PRESET --data MANIFEST_OR_FOLDER`. Every field of the preset is a flag."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    data: Annotated[Path | None, tyro.conf.arg(metavar="MANIFEST|FOLDER")] = None
    """Manifest file, or a dataset folder in a known layout; always needed."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Run folder; by default runs/PRESET."""
    resume: Literal["no", "last"] = "no"
    """last: continue the run in the output folder from its last finished epoch."""
    overwrite: bool = False
    """Replace a run that is in the output folder."""
    prompt_level: PromptLevel = "p6"
    """Detail of the sentences in datasets that have levels; p6 is the paper's."""
    device: Device = "auto"
    """Where to train."""

    def run(self) -> None:
        """Train, then say where the result is and how to score it."""
        from tmca.data.layouts import open_dataset
        from tmca.training import fit

        if self.data is None:
            raise ConfigError("`tmca train` needs --data", hint="name a manifest file or a dataset folder")
        folder = self.output or Path("runs") / self.experiment.name
        manifest = open_dataset(self.data, prompt=self.prompt_level)
        say(f"{manifest.name}: " + ", ".join(f"{count} {split}" for split, count in manifest.splits.items()))
        try:
            record = fit(
                self.experiment,
                manifest,
                folder,
                resume=self.resume == "last",
                overwrite=self.overwrite,
                device=self.device,
            )
        except KeyboardInterrupt:
            say(f"Interrupted; continue with: tmca train {self.experiment.name} … -o {folder} --resume last")
            raise
        _print(
            f"Trained {record.epochs} epochs in {record.seconds / 60:.1f} minutes ({record.stopped}); best epoch "
            f"{record.best_epoch}.\nRun folder: {folder}\n"
            f"Score it: tmca evaluate -m {folder} --data {self.data} --split test"
        )


@dataclass(frozen=True)
class Evaluate:
    """Score a model on a split, with the right sentences and with wrong ones."""

    model: Model
    """Run folder, checkpoint folder or hub id."""
    data: Annotated[Path, tyro.conf.arg(metavar="MANIFEST|FOLDER")]
    """Manifest file, or a dataset folder in a known layout."""
    split: str = "test"
    """Split to score."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder for metrics.csv, summary.json, overlays and report.html; by default RUN/evaluation-SPLIT."""
    threshold: float = 0.5
    """Probability above which a pixel is foreground."""
    space: Literal["network", "original"] = "network"
    """Compare at the size the network sees (as the paper) or at each image's original size."""
    empty_policy: Literal["one", "zero", "skip"] = "one"
    """Per-case score of an image that is empty in mask and prediction: 1, 0, or left out."""
    prompt_level: PromptLevel = "p6"
    """Detail of the sentences in datasets that have levels."""
    seed: int = 0
    """Decides which other sentence an image gets."""
    device: Device = "auto"
    """Where to compute."""
    ledger: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Also write the run's entry of a results ledger."""

    def run(self) -> None:
        """Score, write the files and print the table."""
        from tmca.data.layouts import open_dataset
        from tmca.evaluation import evaluate, write_evaluation, write_ledger
        from tmca.inference import Predictor
        from tmca.report import score_table, write_report

        predictor = Predictor.from_pretrained(self.model, self.device)
        manifest = open_dataset(self.data, prompt=self.prompt_level)
        default = Path(self.model) if Path(self.model).is_dir() else Path("runs") / Path(self.model).name
        folder = self.output or default / f"evaluation-{self.split}"
        evaluation = evaluate(
            predictor.model,
            manifest,
            self.split,
            threshold=self.threshold,
            space=self.space,
            empty_policy=self.empty_policy,
            seed=self.seed,
            device=self.device,
        )
        write_evaluation(evaluation, self.model, manifest, folder)
        name = predictor.experiment.name
        write_report(evaluation, predictor, manifest, folder, model=name)
        if self.ledger is not None:
            write_ledger(evaluation, Path(self.model), manifest, manifest.name, self.ledger)
        _print(score_table(evaluation, f"{name} on {manifest.name}, {self.split} ({len(evaluation.ids)} cases)"))
        _print(f"Report with pictures: {folder / 'report.html'}")


@dataclass(frozen=True)
class Predict:
    """Segment images by sentences: `tmca predict -i IMAGES -o OUT -p "one small polyp, top left" -m RUN`."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-i"], metavar="FILE|FOLDER|GLOB …")]
    """Image files, folders or globs."""
    output: Output
    """Folder for masks, overlays and run_report.json."""
    model: Model
    """Run folder, checkpoint folder or hub id."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"], metavar="SENTENCE")] = None
    """The sentence for all images; left out, images are segmented without one."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv|.jsonl")] = None
    """Sentences by image: columns image and text; an image may stand on several lines."""
    threshold: float = 0.5
    """Probability above which a pixel belongs to the mask."""
    save_probabilities: bool = False
    """Also write 16-bit probability maps."""
    overwrite: bool = False
    """Replace masks that are in the output folder."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        """Segment, say what was written, and fail with exit code 4 if some cases failed."""
        from tmca.batch import find_images, make_jobs, predict_batch, read_jobs
        from tmca.inference import Predictor

        if self.prompt is not None and self.prompts is not None:
            raise ConfigError("Both --prompt and --prompts were given", hint="use one of them")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("The sentence is blank", hint="write a sentence, or leave -p out to segment without one")
        images = find_images(self.input)
        jobs = read_jobs(self.prompts, images) if self.prompts is not None else make_jobs(images, self.prompt)
        predictor = Predictor.from_pretrained(self.model, self.device)
        _warn_of_prompt(predictor, [job.text for job in jobs])
        report = predict_batch(
            predictor,
            jobs,
            self.output,
            model=self.model,
            threshold=self.threshold,
            save_probabilities=self.save_probabilities,
            overwrite=self.overwrite,
        )
        empty = sum(not case["region_found"] for case in report.cases)
        found = f"; no region found in {empty}" if empty else ""
        _print(f"{len(report.cases)} masks in {self.output}{found}. Details: {self.output / 'run_report.json'}")
        for failure in report.failures:
            say(f"failed: {failure['message']} ({failure['hint']})")
        if report.failures and not report.cases:
            raise DataError(f"None of {len(jobs)} cases could be segmented", hint="see the messages above")
        if report.failures:
            raise PartialFailureError(
                f"{len(report.failures)} of {len(jobs)} cases failed, the others are done", hint="see run_report.json"
            )


@dataclass(frozen=True)
class DataPhantom:
    """Draw a phantom dataset: images whose target only the sentence tells."""

    output: Output
    """Folder for images, masks and manifest.csv."""
    train: int = 800
    """Training images."""
    val: int = 100
    """Validation images."""
    test: int = 200
    """Test images."""
    size: int = 128
    """Height and width in pixels."""
    seed: int = 0
    """Seed of the drawing."""
    no_lesion_share: float = 0.05
    """Share of images without lesions."""
    absent_share: float = 0.08
    """Share of images whose sentence names a lesion that is not there."""

    def run(self) -> None:
        """Draw and say where."""
        from tmca.data.phantom import write_phantoms
        from tmca.progress import make_progress

        counts = {"train": self.train, "val": self.val, "test": self.test}
        with make_progress() as progress:
            task = progress.add_task("Drawing phantoms", total=sum(counts.values()))
            write_phantoms(
                self.output,
                counts,
                size=self.size,
                seed=self.seed,
                no_lesion_share=self.no_lesion_share,
                absent_share=self.absent_share,
                progress=lambda done: progress.update(task, completed=done),
            )
        _print(f"{sum(counts.values())} phantoms in {self.output}. Train on them: tmca train demo --data {self.output}")


@dataclass(frozen=True)
class PresetsList:
    """List the named experiments."""

    def run(self) -> None:
        """Print a line each."""
        for name in PRESETS:
            _print(f"{name:28} {describe_preset(name)}")


@dataclass(frozen=True)
class PresetsShow:
    """Print one experiment as JSON."""

    name: tyro.conf.Positional[str]
    """Name of the preset."""

    def run(self) -> None:
        """Print it."""
        _print(json.dumps(to_dict(get_preset(self.name)), indent=2))


@dataclass(frozen=True)
class ModelsList:
    """List the methods that can be trained."""

    def run(self) -> None:
        """Print a line each."""
        from tmca.models import list_models

        for name in list_models():
            _print(name)


VERBS: dict[str, Any] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "data phantom": DataPhantom,
    "presets list": PresetsList,
    "presets show": PresetsShow,
    "models list": ModelsList,
}

GLOBAL_FLAGS = {"-q": "quiet", "--quiet": "quiet", "--debug": "debug", "--offline": "offline"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; see ``docs/reference/cli.md`` for the codes."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; a user's mistake is one line on stderr, never a traceback."""
    flags = {GLOBAL_FLAGS[argument] for argument in arguments if argument in GLOBAL_FLAGS}
    arguments = [argument for argument in arguments if argument not in GLOBAL_FLAGS]
    _prepare_environment(offline="offline" in flags)
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
        _print(usage())
        return 0 if arguments else ConfigError.exit_code
    if arguments[0] == "--version":
        _print(_version())
        return 0
    verb, rest = _verb(arguments)
    _parse(verb, rest).run()
    return 0


def _explain(error: Exception) -> tuple[str, int]:
    """Return the line a user reads and the exit code."""
    if isinstance(error, TMCAError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return f"This verb needs the package {error.name!r} (pip install 'tmca[train]')", TMCAError.exit_code
    if isinstance(error, OSError):
        what = f"{error.strerror or error}: {error.filename or ''}"
        return f"{what} (check the path, its permissions and the free space)", TMCAError.exit_code
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {message} (this is a fault of tmca; --debug shows where)", TMCAError.exit_code


def usage() -> str:
    """Return the list of verbs."""
    lines = ["Language-guided medical image segmentation.", "", "usage: tmca VERB [flags]", ""]
    for verb, command in VERBS.items():
        lines.append(f"  {verb:14} {(command.__doc__ or '').splitlines()[0].partition(': `')[0].rstrip('.')}")
    lines += [
        "",
        "`tmca VERB --help` lists the flags of a verb. Everywhere: -q/--quiet, --offline, --debug, --version.",
    ]
    lines += ["Research only; not a medical device."]
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
    return tyro.cli(Train, args=rest, prog=f"tmca train {preset}", default=Train(get_preset(preset)))


def _split_preset(rest: list[str]) -> tuple[str, list[str]]:
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    if any(argument in ("-h", "--help") for argument in rest):
        return "tmca", rest
    raise ConfigError(f"`tmca train` needs a preset: {', '.join(PRESETS)}", hint="see tmca presets list")


def _prepare_environment(*, offline: bool) -> None:
    """Switch telemetry off and honour offline mode before any library reads its environment."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if offline or os.environ.get("TMCA_OFFLINE", "").lower() in ("1", "true", "yes"):
        os.environ["TMCA_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"


def _print(content: Any) -> None:  # noqa: ANN401
    Console(highlight=False, soft_wrap=isinstance(content, str)).print(content, markup=False)


def _version() -> str:
    from importlib.metadata import version

    return f"tmca {version('tmca')}"


def _warn_of_prompt(predictor: Any, texts: Sequence[str | None]) -> None:  # noqa: ANN401
    if not predictor.model.reads_text and any(texts):
        say("warning: this model was trained without sentences and ignores the prompt")
    for text in dict.fromkeys(text for text in texts if text):
        count, is_cut = predictor.count_tokens(text)
        if is_cut:
            limit = predictor.experiment.model.text_encoder.max_tokens
            say(f"warning: this sentence has {count} tokens and is cut to the model's {limit}: {text!r}")


if __name__ == "__main__":
    main()
