"""Datasets: import, audit, correct, describe, split, draw."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tmca.cli.options import Data, Output, PromptLevel, show
from tmca.config import TextEncoderConfig
from tmca.errors import ConfigError, DataError, PartialFailureError, StorageError
from tmca.presets import get_preset
from tmca.progress import say

if TYPE_CHECKING:
    from tmca.data.manifest import Manifest

ManifestFile = Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE.csv|.jsonl|.parquet")]
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class DataImport:
    """Read a dataset folder into a manifest: `tmca data import [LAYOUT] FOLDER -o manifest.csv`."""

    names: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(name="folder", metavar="[LAYOUT] FOLDER")]]
    """The dataset folder; before it, if it is not recognised by itself, the name of its layout."""
    output: ManifestFile
    """The manifest to write; its paths are relative to it."""
    prompt_level: PromptLevel = "p6"
    """Detail of the sentences in datasets that have levels; p6 is the paper's."""
    seed: int = 0
    """Decides which sentence a case gets where it has several."""
    copy: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Also copy images and masks (as PNG of 0 and 255) into this folder; without it nothing is copied."""
    overwrite: bool = False
    """Replace a manifest that is there."""

    def run(self) -> None:
        """Import, say what was found, and fail with exit code 4 if rows had to be left out."""
        from tmca.data.layouts import read_layout

        if not 1 <= len(self.names) <= 2:
            raise ConfigError("`tmca data import` needs a folder, and before it at most a layout", hint="see --help")
        folder, layout = Path(self.names[-1]), self.names[0] if len(self.names) == 2 else None
        _require_new(self.output, overwrite=self.overwrite)
        imported = read_layout(folder, layout, prompt=self.prompt_level, seed=self.seed)
        manifest = imported.manifest
        if self.copy is not None:
            from tmca.data.layouts.copying import copy_dataset

            manifest = copy_dataset(manifest, self.copy)
        manifest.with_hashes().write(self.output)
        show(f"{imported.layout}: {_counts(manifest)}; {len(manifest.sentences)} distinct sentences → {self.output}")
        problems = self.output.with_name(f"{self.output.stem}.problems.csv")
        if not imported.problems:
            problems.unlink(missing_ok=True)  # of an earlier import to this manifest
            return
        imported.write_problems(problems)
        for problem in imported.problems[:SHOWN_PROBLEMS]:
            say(f"{problem.problem} ({problem.hint})")
        said = ", ".join(f"{count} × {kind}" for kind, count in imported.counts.items())
        say(f"{len(imported.problems)} problems ({said}); all of them: {problems}")
        if imported.left_out:
            raise PartialFailureError(
                f"{imported.left_out} rows of {folder} were left out, the manifest holds the others",
                hint=f"see {problems}",
            )


@dataclass(frozen=True)
class DataAudit:
    """Find what is wrong with a dataset before it is trained on; exit code 3 if anything is."""

    data: tyro.conf.Positional[Data]
    """Manifest file, or a dataset folder in a known layout."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None
    """Write the findings with pictures."""
    json: bool = False
    """Print everything as JSON instead of a table."""
    preset: str | None = None
    """Count tokens as this preset's text encoder does; by default with a vocabulary learned from the training
    sentences, as the mobile presets do."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|HUB-ID")] = None
    """Count tokens with this tokenizer."""
    prompt_level: PromptLevel = "p6"
    """Detail of the sentences in datasets that have levels."""
    workers: int = 2
    """Threads that read images."""

    def run(self) -> None:
        """Audit, print the table, and fail if there are errors."""
        from tmca.audit_report import audit_table, write_audit_report
        from tmca.data.audit import audit
        from tmca.data.layouts import open_dataset

        manifest = open_dataset(self.data, prompt=self.prompt_level)
        count_tokens, limit = _token_counter(self.preset, self.tokenizer, manifest)
        found = audit(manifest, count_tokens=count_tokens, token_limit=limit, workers=self.workers)
        if self.report is not None:
            write_audit_report(found, manifest, self.report)
        if self.json:
            show(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        else:
            show(audit_table(found))
            show(f"Pictures: {self.report}" if self.report else "With pictures: add --report audit.html")
        if found.errors:
            raise DataError(
                f"{len(found.errors)} errors in {manifest.name}", hint="correct them, or know that they are there"
            )


@dataclass(frozen=True)
class DataCorrect:
    """Correct sentences that their mask contradicts: `tmca data correct MANIFEST -o corrected.csv`."""

    data: tyro.conf.Positional[Data]
    """Manifest file, or a dataset folder in a known layout."""
    output: ManifestFile
    """The manifest to write."""
    overwrite: bool = False
    """Replace a manifest that is there."""

    def run(self) -> None:
        """Correct, write, and show an example."""
        from tmca.data.contradictions import correct_manifest
        from tmca.data.layouts import open_dataset

        _require_new(self.output, overwrite=self.overwrite)
        manifest = open_dataset(self.data)
        correct = correct_manifest(manifest)
        correct.write(self.output)
        pairs = zip(manifest.records, correct.records, strict=True)
        example = next(((old, new) for old, new in pairs if old.text != new.text), None)
        if example is not None:
            show(f"{example[0].id}: {example[0].text} → {example[1].text}")
        show(f"{len(correct.records)} cases → {self.output}")
        _tell_provenance(correct)


@dataclass(frozen=True)
class DataDescribe:
    """Write sentences from masks: `tmca data describe MANIFEST -o described.csv --grammar polyp`."""

    data: tyro.conf.Positional[Data]
    """Manifest file, or a dataset folder in a known layout."""
    output: ManifestFile
    """The manifest to write."""
    grammar: Literal["polyp", "phantom", "lung"]
    """What the masks show; decides the words."""
    level: Annotated[str, tyro.conf.arg(metavar="p0…p6")] = "p6"
    """Detail, from nothing to everything."""
    paraphrases: int = 0
    """How many other wordings to mix in, 0 to 3."""
    seed: int = 0
    """Decides which wording a case gets."""
    replace_sentences: bool = False
    """Also replace sentences that were not written from masks."""
    overwrite: bool = False
    """Replace a manifest that is there."""

    def run(self) -> None:
        """Describe, write, and say what such sentences are."""
        from tmca.data.describe import describe_manifest
        from tmca.data.layouts import open_dataset

        _require_new(self.output, overwrite=self.overwrite)
        manifest = open_dataset(self.data)
        described = describe_manifest(
            manifest,
            self.grammar,
            self.level,
            paraphrases=self.paraphrases,
            seed=self.seed,
            overwrite=self.replace_sentences,
        )
        written = [record for record in described.records if record.text_provenance == "from_mask"]
        if not written:
            raise DataError(f"{manifest.name} holds nothing to describe, and nothing was written")
        described.write(self.output)
        example = next((record for record in written if record.text), None)
        if example is not None:
            show(f"{example.id}: {example.text}")
        show(f"{len(described.sentences)} distinct sentences → {self.output}")
        _tell_provenance(described)


@dataclass(frozen=True)
class DataSplit:
    """Divide a dataset into train, val and test by patient, into folds, or its training cases into nested fractions."""

    data: tyro.conf.Positional[Data]
    """Manifest file, or a dataset folder in a known layout."""
    output: ManifestFile
    """The manifest to write; with --folds, NAME-fold1.csv and so on; with --fractions, 25 % go to NAME-25.csv."""
    train: float = 0.7
    """Share of the cases for training."""
    val: float = 0.1
    """Share for validation."""
    test: float = 0.2
    """Share for the test."""
    within: Annotated[str | None, tyro.conf.arg(metavar="SPLIT")] = None
    """Divide this split only and leave the others, e.g. to take a validation split from train."""
    folds: int = 0
    """Write a manifest for each of N folds of a cross-validation instead: each case is tested in one of them."""
    fractions: tuple[float, ...] = ()
    """Keep the splits and write smaller training sets instead, each part of the next: 0.25 0.5 0.75."""
    seed: int = 0
    """Decides who goes where."""
    resplit: bool = False
    """Give up splits that are there; published splits make scores comparable."""
    overwrite: bool = False
    """Replace manifests that are there."""

    def run(self) -> None:
        """Split and say how many cases went where."""
        from tmca.data.layouts import open_dataset
        from tmca.data.splits import cross_validation_folds, nested_fractions, split_manifest

        self._require_one_way()
        manifest, stem = open_dataset(self.data), self.output.stem
        if self.folds:
            folds = cross_validation_folds(manifest, self.folds, self.seed, val=self.val, overwrite=self.resplit)
            written = {self.output.with_stem(f"{stem}-fold{number}"): fold for number, fold in enumerate(folds, 1)}
        elif self.fractions:
            parts = nested_fractions(manifest, self.fractions, seed=self.seed)
            written = {self.output.with_stem(f"{stem}-{100 * share:g}"): part for share, part in parts.items()}
        else:
            shares = {"train": self.train, "val": self.val, "test": self.test}
            shares = {name: share for name, share in shares.items() if share}
            written = {
                self.output: split_manifest(manifest, shares, self.seed, within=self.within, overwrite=self.resplit)
            }
        for path in written:
            _require_new(path, overwrite=self.overwrite)
        for path, part in written.items():
            part.write(path)
            show(f"{_counts(part)} → {path}")

    def _require_one_way(self) -> None:
        """Refuse what goes with one of the three ways to divide only."""
        from tmca.data.splits import SHARES

        changed = [name for name, share in SHARES.items() if getattr(self, name) != share]
        if self.folds and self.fractions:
            raise ConfigError(
                "--folds and --fractions do not go together", hint="take --fractions of a fold's manifest"
            )
        if self.folds and (self.within or set(changed) - {"val"}):
            raise ConfigError("--folds divides all cases: --within, --train and --test do not go with it")
        if self.fractions and (self.within or self.resplit):
            raise ConfigError("--fractions keeps the splits: --within and --resplit do not go with it")
        if self.fractions and changed:
            raise ConfigError(
                "--fractions keeps the splits: --train, --val and --test do not go with it",
                hint="split first, then take --fractions of the manifest that was written",
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
        show(f"{sum(counts.values())} phantoms in {self.output}. Train on them: tmca train demo --data {self.output}")


def _counts(manifest: Manifest) -> str:
    return ", ".join(f"{count} {split or 'without split'}" for split, count in manifest.splits.items())


def _tell_provenance(manifest: Manifest) -> None:
    from tmca.data.describe import provenance_notice

    notice = provenance_notice(manifest)
    if notice:
        say(f"note: {notice}")


def _require_new(path: Path, *, overwrite: bool) -> None:
    from tmca.data.tables import require_writable

    require_writable(path)
    if path.exists() and not overwrite:
        raise StorageError(f"{path} is there already", hint="replace it with --overwrite, or choose another name")


def _token_counter(
    preset: str | None, tokenizer: str | None, manifest: Manifest
) -> tuple[Callable[[list[str]], list[int]] | None, int | None]:
    """Return a function that counts tokens as a text encoder would, and the encoder's limit."""
    from tmca.models.tokenizer import SCRATCH, build_tokenizer

    config = TextEncoderConfig(weights=SCRATCH, freeze=False)
    if preset is not None:
        config = get_preset(preset).model.text_encoder
    if tokenizer is not None:
        config = replace(config, tokenizer=tokenizer)
    training = [record.text for record in manifest.records if record.text and record.split in ("train", "")]
    if config.learns_vocabulary and not training:
        return None, None
    built = build_tokenizer(config, training)
    return lambda texts: list(built(texts).token_counts), config.max_tokens
