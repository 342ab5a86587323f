"""The main job: demo, train, evaluate, predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tmca.cli.options import Data, Device, Models, Output, PromptLevel, show
from tmca.config import Experiment
from tmca.errors import ConfigError, DataError, PartialFailureError
from tmca.presets import PRESETS
from tmca.progress import say

if TYPE_CHECKING:
    from tmca.batch import Engine
    from tmca.inference import Predictor
    from tmca.jobs import Job


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
        show(score_table(evaluation, "Held-out phantoms"))
        took = sum(result["seconds"].values())
        show(f"{took:.0f} seconds. Report with pictures: {self.output / 'report.html'}; trained model: {result['run']}")


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
    devices: int = 1
    """Processes on this machine that share each batch, one a GPU; under torchrun its own number counts."""
    nodes: int = 1
    """Machines of a Slurm job that share each batch."""

    def run(self) -> None:
        """Train, then say where the result is and how to score it."""
        from tmca.data.layouts import open_dataset
        from tmca.runs import can_resume, train_run
        from tmca.training.processes import ProcessLayout

        if self.data is None:
            raise ConfigError("`tmca train` needs --data", hint="name a manifest file or a dataset folder")
        folder = self.output or Path("runs") / self.experiment.name
        manifest = open_dataset(self.data, prompt=self.prompt_level)
        say(f"{manifest.name}: " + ", ".join(f"{count} {split}" for split, count in manifest.splits.items()))
        try:
            record = train_run(
                self.experiment,
                manifest,
                folder,
                resume=self.resume == "last",
                overwrite=self.overwrite,
                device=self.device,
                devices=self.devices,
                nodes=self.nodes,
            )
        except KeyboardInterrupt:
            preset = self.experiment.name if self.experiment.name in PRESETS else "PRESET"
            if can_resume(folder):
                say(f"Interrupted; continue with: tmca train {preset} --data {self.data} -o {folder} --resume last")
            else:
                say("Interrupted before an epoch was finished; start again with --overwrite")
            raise
        if not ProcessLayout.of(self.devices, self.nodes).is_first:
            return
        show(
            f"Trained {record.epochs} epochs in {record.seconds / 60:.1f} minutes ({record.stopped}); best epoch "
            f"{record.best_epoch}.\nRun folder: {folder}\n"
            f"Score it: tmca evaluate -m {folder} --data {self.data} --split test"
        )


@dataclass(frozen=True)
class Evaluate:
    """Score a model on a split, with the right sentences and with wrong ones."""

    model: Models
    """Run folder, checkpoint folder or hub id; of several the probabilities are averaged."""
    data: Data
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
    surface: bool = False
    """Also measure how far outlines lie apart: HD95 and surface Dice."""
    tolerance: float = 2.0
    """Distance up to which the surface Dice counts outlines as equal: in millimetres with --space original if the data
    has a spacing for every image, else in pixels."""
    mirrored: bool = False
    """Segment each image together with its mirror image and average: a little better, twice the time."""
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
        from tmca.checkpoints import resolve_checkpoint
        from tmca.data.layouts import open_dataset
        from tmca.evaluation.writing import read_run, write_ledger
        from tmca.inference import Predictor
        from tmca.nnunet.workspace import is_nnunet_run
        from tmca.report import score_table, surface_line, write_report
        from tmca.runs import score_run

        first = Path(self.model[0])
        is_external = is_nnunet_run(first)
        for name in () if is_external else self.model:
            resolve_checkpoint(name)  # a model that is not there is refused before the data is read
        if len(self.model) > 1 and self.output is None:
            raise ConfigError("Averaged models have no folder for their scores", hint="name one with --output")
        if self.ledger is not None:
            if self.ledger.suffix != ".json":
                raise ConfigError(f"--ledger is {self.ledger}, expected a name that ends in .json", hint="rename it")
            for name in self.model:
                read_run(Path(name))  # what is no run folder is refused before an hour of scoring
        manifest = open_dataset(self.data, prompt=self.prompt_level)
        default = first if first.is_dir() else Path("runs") / first.name
        folder = self.output or default / f"evaluation-{self.split}"
        evaluation = score_run(
            self.model,
            manifest,
            self.split,
            folder,
            threshold=self.threshold,
            space=self.space,
            empty_policy=self.empty_policy,
            surface_tolerance=self.tolerance if self.surface else None,
            mirrored=self.mirrored,
            seed=self.seed,
            device=self.device,
        )
        name = evaluation.experiment.name if evaluation.experiment is not None else first.name
        name += f", {len(self.model)} models averaged" if len(self.model) > 1 else ""
        if self.ledger is not None:
            write_ledger(evaluation, [Path(run) for run in self.model], manifest, manifest.name, self.ledger)
        show(score_table(evaluation, f"{name} on {manifest.name}, {self.split} ({len(evaluation.ids)} cases)"))
        if evaluation.surface is not None:
            show(surface_line(evaluation))
        if is_external:
            show(f"Scores of the cases: {folder / 'metrics.csv'}")
            return
        predictor = Predictor.from_pretrained(self.model, self.device, "32", mirrored=self.mirrored)
        write_report(evaluation, predictor, manifest, folder, model=name)
        show(f"Report with pictures: {folder / 'report.html'}")


@dataclass(frozen=True)
class Predict:
    """Segment images by sentences: `tmca predict -i IMAGES -o OUT -p "one small polyp, top left" -m RUN`."""

    output: Output
    """Folder for masks, overlays and run_report.json."""
    model: Models
    """Run folders, checkpoint folders or hub ids; of several the probabilities are averaged."""
    input: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-i"], metavar="FILE|FOLDER|GLOB …")] = ()
    """Image files, folders or globs; may be left out where --prompts names them."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"], metavar="SENTENCE")] = None
    """The sentence for all images; left out, images are segmented without one."""
    prompts: Annotated[Path | None, tyro.conf.arg(aliases=["--jobs"], metavar="FILE.csv|.jsonl")] = None
    """Sentences by image: columns image and text or report, such as a manifest; an image may stand on several lines."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE.txt")] = None
    """A clinical report that the sentence for all images is taken from."""
    threshold: float = 0.5
    """Probability above which a pixel belongs to the mask."""
    min_region: int = 0
    """Leave out connected regions of fewer pixels."""
    mirrored: bool = False
    """Average over each image and its mirror image: a little better, twice the time."""
    prompt_effect: bool = False
    """Also compare each mask with those of the reordered and of a contradictory sentence."""
    series: bool = False
    """The input folders hold DICOM series: the slices of one become a volume."""
    output_type: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TYPE …")] = ()
    """Types of the results: png, nifti, rle, dicom-seg, dicom-fractional, dicom-sr, dicom-sc; by default nifti for
    NIfTI volumes, else png."""
    save_probabilities: bool = False
    """Also write probability maps: 16-bit PNG, or NIfTI where masks are."""
    overlays: bool = True
    """Also draw each mask on its image, in overlays/; the form with no- before the name turns it off."""
    target: str = ""
    """What is segmented, by a name of the table of codes, for DICOM; by default what the sentence names."""
    codes: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Your own table of codes for DICOM."""
    prompt_in_dicom: bool = False
    """Write the sentence into DICOM files; it may hold patient data."""
    num_parts: int = 1
    """Split the work into so many equal shares, for as many machines; all may write to one folder."""
    part_id: int = 0
    """Which share this is, from 0."""
    engine: Literal["local", "ray"] = "local"
    """ray: work on the Ray cluster that RAY_ADDRESS names, or this machine belongs to."""
    workers: int | None = None
    """With --engine ray, at most so many at a time; by default as many as the cluster has cards, or else processors."""
    overwrite: bool = False
    """Compute everything again; by default, what is finished in the output folder is kept."""
    device: Device = "auto"
    """Where to compute."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """32: float32; bf16: faster; auto: bf16 where the device computes it and the method is known to keep its masks."""

    def run(self) -> None:
        """Segment, say what was written, and fail with exit code 4 if some cases failed."""
        from tmca.batch import BatchOptions, predict_batch
        from tmca.inference import Predictor
        from tmca.outputs import OutputOptions
        from tmca.prediction import ALL_EFFECTS, PredictionOptions

        options = BatchOptions(
            prediction=PredictionOptions(
                self.threshold, self.min_region, ALL_EFFECTS if self.prompt_effect else ALL_EFFECTS[:1]
            ),
            outputs=OutputOptions(
                types=self.output_type,
                probabilities=self.save_probabilities,
                overlays=self.overlays,
                target=self.target,
                codes=self.codes,
                prompt_in_dicom=self.prompt_in_dicom,
            ),
            overwrite=self.overwrite,
            part=(self.part_id, self.num_parts),
        )
        jobs = self._jobs()
        predictor = Predictor.from_pretrained(self.model, self.device, self.precision, mirrored=self.mirrored)
        _warn_of_prompt(predictor, [job.text for job in jobs])
        try:
            report = predict_batch(predictor, jobs, self.output, options, engine=self._engine())
        except KeyboardInterrupt:
            say(f"Interrupted; the same command goes on where it was: what is finished stays in {self.output}")
            raise
        empty = sum(not case["region_found"] for case in report.cases)
        conflicts = sum(bool(case.get("conflicts")) for case in report.cases)
        found = f"; no region found in {empty}" if empty else ""
        found += f"; {conflicts} contradict their sentence" if conflicts else ""
        details = self.output / f"run_report{options.suffix}.json"
        show(f"{len(report.cases)} masks in {self.output}{found}. Details: {details}")
        for skipped in report.skipped:
            say(f"skipped: {skipped['message']} ({skipped['hint']})")
        for failure in report.failures:
            say(f"failed: {failure['message']} ({failure['hint']})")
        count = len(report.cases) + len(report.failures)
        if report.failures and not report.cases:
            raise DataError(f"None of {count} cases could be segmented", hint="see the messages above")
        if report.failures:
            raise PartialFailureError(
                f"{len(report.failures)} of {count} cases failed, the others are done", hint=f"see {details}"
            )

    def _engine(self) -> Engine | None:
        if self.engine == "local":
            if self.workers is not None:
                raise ConfigError("--workers needs --engine ray", hint="leave it out")
            return None
        from tmca.cluster import Cluster

        return Cluster(self.model, self.device, self.precision, mirrored=self.mirrored, workers=self.workers)

    def _jobs(self) -> list[Job]:
        from tmca.jobs import find_images, make_jobs, make_series_jobs, read_jobs, read_prompt
        from tmca.reports.prompt import NOTHING

        given = {"--prompt": self.prompt, "--prompts": self.prompts, "--report": self.report}
        if len(names := [name for name, value in given.items() if value is not None]) > 1:
            raise ConfigError(f"Both {names[0]} and {names[1]} were given", hint="use one of them")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("The sentence is blank", hint="write a sentence, or leave -p out to segment without one")
        if not self.input:
            if self.prompts is None:
                raise ConfigError("There is no image to segment", hint="name files or folders with --input")
            return read_jobs(self.prompts)
        report = None if self.report is None else read_prompt(self.report)
        if report is not None:
            say(f"the report says: {report.prompt or NOTHING}")
        text = self.prompt if report is None else report.prompt
        if self.series:
            if self.prompts is not None:
                raise ConfigError(
                    "--series and --prompts were given", hint="name the slices' folders one by one with -p"
                )
            return make_series_jobs(self.input, text, report, self.output)
        images = find_images(self.input, self.output)
        if self.prompts is None:
            return make_jobs(images, text, report)
        jobs = read_jobs(self.prompts, images)
        left_out = len(images) - len({job.image for job in jobs})
        if left_out:
            say(f"warning: {left_out} of {len(images)} images have no line in {self.prompts} and are not segmented")
        return jobs


def _warn_of_prompt(predictor: Predictor, texts: Sequence[str | None]) -> None:
    from tmca.prediction import shortened

    if not predictor.reads_text and any(texts):
        say("warning: this model was trained without sentences and ignores the prompt")
    for text in dict.fromkeys(text for text in texts if text):
        count, is_cut = predictor.count_tokens(text)
        if is_cut:
            limit = predictor.experiment.model.text_encoder.max_tokens
            shown = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
            say(f"warning: this sentence has {count} tokens and is cut to the model's {limit}: {shown!r}")
    unknown = list(dict.fromkeys(word for text in dict.fromkeys(texts) for word in predictor.unknown_words(text)))
    if unknown:
        say(f"warning: not in the model's vocabulary, and spelled letter by letter: {shortened(unknown)}")


LONGEST_SHOWN = 200
