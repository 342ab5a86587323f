"""Seeded splits that keep a patient's cases together, folds of a cross-validation, nested shares of training cases."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tmca.data.manifest import Manifest, Record, seeded_number
from tmca.errors import ConfigError, DataError
from tmca.imaging.reading import split_frame

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
"""Shares of the cases that a split gets if nothing else is asked for."""


def split_manifest(
    manifest: Manifest,
    shares: Mapping[str, float] = SHARES,
    seed: int = 0,
    *,
    within: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Deal the cases out to splits at random, all cases of a patient to one split.

    A case without a ``patient_id`` counts as a patient of its own. The patients are dealt out in a random order, each
    to the split that lacks most cases; then patients are moved or exchanged as long as that brings the splits nearer to
    their shares. The result depends on the seed, the ids and the patients, not on the order of the rows.

    Args:
        manifest: The cases.
        shares: Share of the cases for each split, together 1; a split of share 0 is not made.
        seed: Decides which patient goes where.
        within: Deal out the cases of this split only and leave the others as they are, e.g. to take a validation split
            from ``train``.
        overwrite: Replace splits that are there.

    Returns:
        The manifest with the column split filled, in its order.

    Raises:
        ConfigError: The shares are no shares of 1, or name a split that is to stay.
        DataError: Cases have a split already, or there are fewer patients than splits.
    """
    wanted = _checked_shares(shares)
    cases = manifest.records if within is None else manifest.split(within).records
    kept = {record.split for record in manifest.records if within is not None and record.split != within}
    if kept & wanted.keys():
        name = min(kept & wanted.keys())
        raise ConfigError(
            f"The split {name!r} of {manifest.name} is there already",
            hint=f"give it no share: --{name} 0; the others then add up to 1"
            if name in SHARES
            else "choose another name",
        )
    if within is None and not overwrite and any(record.split for record in cases):
        there = ", ".join(f"{name or '(none)'} ({count})" for name, count in manifest.splits.items())
        raise DataError(
            f"{manifest.name} is split already: {there}",
            hint="published splits make scores comparable; to give them up: --resplit",
        )
    groups = _groups(cases)
    if len(groups) < len(wanted):
        raise DataError(
            f"{manifest.name} has {len(groups)} patients for {len(wanted)} splits",
            hint="a patient's cases stay together: ask for fewer splits, or check the column patient_id",
        )
    order = sorted(groups, key=lambda name: seeded_number(seed, name))
    sizes = [len(groups[name]) for name in order]
    targets = {split: share * len(cases) for split, share in wanted.items()}
    dealt = _deal(sizes, targets)
    split_of = {record.id: split for name, split in zip(order, dealt, strict=True) for record in groups[name]}
    return manifest.with_records(
        replace(record, split=split_of.get(record.id, record.split)) for record in manifest.records
    )


def cross_validation_folds(
    manifest: Manifest, count: int = 5, seed: int = 0, *, val: float = SHARES["val"], overwrite: bool = False
) -> list[Manifest]:
    """Return one manifest a fold of a cross-validation: each case is in the test split of exactly one of them.

    The cases are dealt out to the folds as :func:`split_manifest` deals them out to splits, so that a patient's cases
    stay together. What is not in the test split of a fold is divided into ``train`` and ``val``.

    Args:
        manifest: The cases.
        count: Number of folds, 2 or more.
        seed: Decides who goes where.
        val: Share of all cases that each fold validates on; 0 makes no validation split.
        overwrite: Replace splits that are there.

    Raises:
        ConfigError: ``count`` is below 2, or ``val`` leaves nothing to train on.
        DataError: Cases have a split already, or there are too few patients.
    """
    if count < 2:
        raise ConfigError(f"{count} folds were asked for, expected 2 or more", hint="5 are usual")
    left = 1 - 1 / count
    if not 0 <= val < left:
        raise ConfigError(
            f"A share of {val:g} for validation leaves nothing to train on: of {count} folds {left:g} are not tested"
        )
    names = [f"fold {number}" for number in range(1, count + 1)]
    dealt = split_manifest(manifest, dict.fromkeys(names, 1 / count), seed, overwrite=overwrite)
    shares = {"train": 1 - val / left, "val": val / left}
    folds = []
    for name in names:
        tested = dealt.with_records(
            replace(record, split="test" if record.split == name else "rest") for record in dealt.records
        )
        patients = len(_groups(record for record in tested.records if record.split == "rest"))
        if val and patients < 2:
            raise DataError(
                f"Without {name} of {manifest.name} {patients} patient is left to train and to validate on",
                hint="make another number of folds, or none for validation: --val 0",
            )
        folds.append(split_manifest(tested, shares, seed, within="rest"))
    return folds


def nested_fractions(
    manifest: Manifest, fractions: Iterable[float] = (0.25, 0.5, 0.75), seed: int = 0, *, split: str = "train"
) -> dict[float, Manifest]:
    """Return manifests with a share of one split's cases and all of the others', for data-efficiency runs.

    They are nested: every case of a smaller share is in the larger ones. The cases are those of
    :meth:`tmca.data.manifest.Manifest.fraction`, so training on the manifest of 0.25 is training on the whole one with
    ``trainer.train_fraction`` 0.25 and the same seed. Cases are drawn one by one, not by patient: what is left out is
    not used elsewhere, so nothing leaks, and the published shares are shares of images.

    Args:
        manifest: The cases of all splits.
        fractions: Shares in (0, 1].
        seed: Decides which cases.
        split: The split that is thinned out.

    Returns:
        A manifest for each fraction, in rising order.

    Raises:
        ConfigError: A fraction is not in (0, 1], or there is none.
        DataError: There is no such split.
    """
    rising = sorted(set(fractions))
    if not rising:
        raise ConfigError("No fraction was asked for", hint="e.g. 0.25 0.5 0.75")
    part = manifest.split(split)
    found = {}
    for fraction in rising:
        chosen = {record.id for record in part.fraction(fraction, seed).records}
        found[fraction] = manifest.with_records(
            record for record in manifest.records if record.split != split or record.id in chosen
        )
    return found


def _checked_shares(shares: Mapping[str, float]) -> dict[str, float]:
    for name, share in shares.items():
        if not name.strip() or not 0 <= share <= 1:
            raise ConfigError(f"The share of split {name!r} is {share!r}, expected 0 to 1", hint="e.g. train: 0.7")
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        listed = " + ".join(f"{share:g}" for share in shares.values()) or "nothing"
        raise ConfigError(f"The shares of the splits are {listed}, expected a sum of 1", hint="e.g. 0.7 + 0.1 + 0.2")
    return {name: share for name, share in shares.items() if share > 0}


def _groups(cases: Iterable[Record]) -> dict[str, list[Record]]:
    cases = list(cases)
    files = {record.id: split_frame(record.image)[0] for record in cases}
    repeated = Counter(files.values())
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in cases:
        if record.patient_id:
            name = f"patient:{record.patient_id}"
        elif repeated[files[record.id]] > 1:  # slices of a volume, or several sentences on one image
            name = f"file:{files[record.id]}"
        else:
            name = f"case:{record.id}"
        groups[name].append(record)
    return groups


def _deal(sizes: list[int], targets: Mapping[str, float]) -> list[str]:
    """Return a split for each group, in order, so that the splits' cases come near their targets."""
    counts = dict.fromkeys(targets, 0)
    dealt: list[str] = []
    for position, size in enumerate(sizes):
        empty = [split for split, count in counts.items() if count == 0]
        # The last groups are for the splits that have none yet.
        open_splits = empty if len(sizes) - position <= len(empty) else list(targets)
        split = max(open_splits, key=lambda name: targets[name] - counts[name])
        counts[split] += size
        dealt.append(split)
    while _improve(sizes, dealt, counts, targets):
        pass
    return dealt


def _improve(sizes: list[int], dealt: list[str], counts: dict[str, int], targets: Mapping[str, float]) -> bool:
    """Move one group, or exchange two, where that lowers the squared distance to the targets most; say whether so.

    Only sizes matter, so one group of each size and split stands for all: the first in the random order.
    """
    first: dict[str, dict[int, int]] = {split: {} for split in targets}
    for position, split in enumerate(dealt):
        first[split].setdefault(sizes[position], position)
    members = {split: dealt.count(split) for split in targets}
    best, chosen = -1e-9, None
    for source, goal in itertools.permutations(targets, 2):
        surplus = (counts[source] - targets[source]) - (counts[goal] - targets[goal])
        for size in first[source]:
            for back in (0, *first[goal]):
                shift = size - back
                gain = 2 * shift * (shift - surplus)  # change of the sum of squares; negative is nearer
                if gain < best and (back or members[source] > 1):
                    best, chosen = gain, (source, goal, size, back)
    if chosen is None:
        return False
    source, goal, size, back = chosen
    dealt[first[source][size]] = goal
    if back:
        dealt[first[goal][back]] = source
    counts[source] -= size - back
    counts[goal] += size - back
    return True
