from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tmca import cluster
from tmca.batch import BatchOptions, BatchReport, predict_batch
from tmca.cluster import Cluster
from tmca.data.manifest import Manifest
from tmca.errors import CheckpointError, ConfigError, StorageError
from tmca.imaging.raster import read_mask
from tmca.inference import Predictor
from tmca.jobs import Job, make_jobs
from tmca.models import TMCA

PROMPT = "one small bright round lesion, located in top left of the image"
ROOT = Path(__file__).resolve().parents[1]
MEMORY = 80_000_000


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., TMCA], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def jobs(phantoms: Manifest) -> list[Job]:
    return make_jobs([phantoms.image_path(record) for record in phantoms.records], PROMPT)


def test_ray_that_is_not_installed_is_named(
    model_folder: Path, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="needs Ray") as caught:
        list(Cluster((str(model_folder),))(jobs, tmp_path, BatchOptions()))
    assert "tmca[ray]" in caught.value.hint


def test_what_is_wrong_is_refused_before_ray_starts(jobs: list[Job], tmp_path: Path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        list(Cluster((str(tmp_path),))(jobs, tmp_path, BatchOptions()))
    with pytest.raises(ConfigError, match="0 workers"):
        list(Cluster((str(tmp_path),), workers=0)(jobs, tmp_path, BatchOptions()))


def test_no_jobs_need_no_cluster(tmp_path: Path):
    assert list(Cluster((str(tmp_path),))([], tmp_path, BatchOptions())) == []


# With Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module with the worker that fails, which the cluster uses; workers can import it, too."""
    pytest.importorskip("ray.data", reason="needs tmca[ray]")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]))
    import cluster_jobs

    monkeypatch.setattr(cluster, "Worker", cluster_jobs.FaultyWorker)
    return cluster_jobs


@pytest.fixture
def two_machines(faulty: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:  # noqa: ARG001
    """Return a cluster of a head that does not segment and two machines of one processor each."""
    import ray
    from ray.cluster_utils import Cluster as Machines

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Machines(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY},
    )
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=MEMORY)
        made.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def _predict(jobs: list[Job], out: Path, model_folder: Path, **settings: Any) -> BatchReport:
    predictor = Predictor.from_pretrained(model_folder, "cpu", "32")
    engine = Cluster((str(model_folder),), precision="32", **settings)
    return predict_batch(predictor, jobs, out, engine=engine)


def _begun(out: Path) -> list[str]:
    return [line.split()[0] for line in (out / "begun.txt").read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_masks_are_those_of_one_machine(two_machines: Any, jobs: list[Job], model_folder: Path, out: Path):
    broken = out.parent / "broken.png"
    broken.write_bytes(b"no image")
    asked = [*jobs[:7], Job(broken, PROMPT, "broken"), Job(jobs[7].image, None, "without")]
    report = _predict(asked, out, model_folder)
    done = [*jobs[:7], asked[8]]
    assert [case["name"] for case in report.cases] == [job.name for job in done]
    (failure,) = report.failures
    assert str(broken) in failure["message"]
    predictor = Predictor.from_pretrained(model_folder, "cpu", "32")
    for job in done:
        predictor.set_image(job.image)
        np.testing.assert_array_equal(read_mask(out / f"{job.name}.png"), predictor.predict(job.text))
    assert len(_begun(out)) == len(asked)
    assert predict_batch(predictor, asked, out).resumed == 8
    assert two_machines.list_all_nodes()


@pytest.mark.slow
def test_what_a_killed_worker_had_begun_is_done_again(
    two_machines: Any, faulty: ModuleType, jobs: list[Job], model_folder: Path, out: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(cluster, "BLOCK_SIZE", 4)
    faulty.say(out, seconds="0.05", kill=jobs[13].name)
    report = _predict(jobs, out, model_folder)
    assert (out / "killed").exists()
    _assert_complete(report, jobs, out, block=4)
    assert two_machines.list_all_nodes()


@pytest.mark.slow
def test_what_a_lost_machine_had_begun_is_done_again(
    two_machines: Any, faulty: ModuleType, jobs: list[Job], model_folder: Path, out: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(cluster, "BLOCK_SIZE", 4)
    faulty.say(out, seconds="0.5")
    lost = []

    def lose() -> None:
        while not (out / "begun.txt").exists() or len({*(out / "begun.txt").read_text().split()[1::2]}) < 2:
            time.sleep(0.05)  # until both work
        lost.append(two_machines.list_all_nodes()[-1])
        two_machines.remove_node(lost[0], allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    report = _predict(jobs, out, model_folder)
    thread.join(timeout=30)
    assert len(lost) == 1
    _assert_complete(report, jobs, out, block=4)


def _assert_complete(report: BatchReport, jobs: list[Job], out: Path, *, block: int) -> None:
    assert [case["name"] for case in report.cases] == [job.name for job in jobs]
    for job in jobs:
        assert read_mask(out / f"{job.name}.png").shape == (64, 64)
    begun = Counter(_begun(out))
    assert set(begun) == {job.name for job in jobs}
    assert max(begun.values()) <= 2
    assert 1 <= sum(count - 1 for count in begun.values()) <= block


@pytest.mark.slow
def test_a_full_disk_ends_everything(
    two_machines: Any, faulty: ModuleType, jobs: list[Job], model_folder: Path, out: Path
):
    faulty.say(out, full=jobs[3].name)
    with pytest.raises(StorageError, match="Cannot write") as caught:
        _predict(jobs, out, model_folder)
    assert caught.value.hint == "the disk is full"
    with pytest.raises(ConfigError, match="no GPU"):
        _predict(jobs, out, model_folder, device="cuda")
    assert two_machines.list_all_nodes()


@pytest.mark.slow
def test_without_a_cluster_this_machine_is_one(
    faulty: ModuleType, jobs: list[Job], model_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    import ray

    assert faulty
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    report = _predict(jobs[:2], out, model_folder, workers=1)
    assert [case["prompt"] for case in report.cases] == [PROMPT] * 2
    assert not ray.is_initialized()
