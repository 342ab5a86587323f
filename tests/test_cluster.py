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
from tmca.batch import Job, make_jobs
from tmca.cluster import predict_on_cluster
from tmca.data.manifest import Manifest
from tmca.errors import CheckpointError, ConfigError, StorageError
from tmca.imaging.raster import read_mask
from tmca.inference import Predictor
from tmca.models import TMCA

PROMPT = "one small bright round lesion, located in top left of the image"
ROOT = Path(__file__).resolve().parents[1]
MEMORY = 80_000_000


def nobody(*_: Any) -> dict[str, Any]:
    raise AssertionError("nothing is segmented")


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., TMCA], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "model"
    tiny_model().save_pretrained(folder)
    return folder


def test_ray_that_is_not_installed_is_named(
    model_folder: Path, phantoms: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    jobs = make_jobs([phantoms.image_path(phantoms.records[0])], PROMPT)
    with pytest.raises(ConfigError, match="needs Ray") as caught:
        predict_on_cluster(jobs, tmp_path, model=str(model_folder), segment_job=nobody)
    assert "tmca[ray]" in caught.value.hint


def test_what_is_wrong_is_refused_before_ray_starts(phantoms: Manifest, tmp_path: Path):
    jobs = make_jobs([phantoms.image_path(phantoms.records[0])], PROMPT)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        predict_on_cluster(jobs, tmp_path, model=str(tmp_path), segment_job=nobody)
    with pytest.raises(ConfigError, match="0 workers"):
        predict_on_cluster(jobs, tmp_path, model=str(tmp_path), segment_job=nobody, workers=0)


def test_no_jobs_need_no_cluster(tmp_path: Path):
    assert predict_on_cluster([], tmp_path, model=str(tmp_path), segment_job=nobody) == []


# With Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenting() -> Iterator[ModuleType]:
    """Return the module with the job, which workers can import too."""
    pytest.importorskip("ray.data", reason="needs tmca[ray]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]))
        patch.syspath_prepend(str(ROOT / "tests"))
        import cluster_jobs

        yield cluster_jobs


@pytest.fixture
def two_machines(segmenting: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:  # noqa: ARG001
    """Return a cluster of a head that does not segment and two machines of one processor each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(
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
        made.shutdown()


@pytest.fixture
def jobs(phantoms: Manifest) -> list[Job]:
    return make_jobs([phantoms.image_path(record) for record in phantoms.records], PROMPT)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def _begun(out: Path) -> list[str]:
    return [line.split()[0] for line in (out / "begun.txt").read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_masks_are_those_of_one_machine(
    two_machines: Any, segmenting: ModuleType, jobs: list[Job], model_folder: Path, out: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("TMCA_OFFLINE", "1")
    broken = out / "broken.png"
    broken.write_bytes(b"no image")
    asked = [*jobs[:7], Job(broken, PROMPT, "broken"), Job(jobs[7].image, None, "without")]
    found = predict_on_cluster(asked, out, model=str(model_folder), segment_job=segmenting.segment, precision="32")
    assert [entry["image"] for entry in found] == [str(job.image) for job in asked]
    assert found[7]["code"] == "invalid_input"
    assert str(broken) in found[7]["message"]
    assert (found[8]["prompt"], found[8]["offline"]) == (None, "1")
    predictor = Predictor.from_pretrained(model_folder, "cpu", "32")
    for job in (*jobs[:7], asked[8]):
        predictor.set_image(job.image)
        np.testing.assert_array_equal(read_mask(out / f"{job.name}.png"), predictor.predict(job.text))
    assert len(_begun(out)) == len(asked)
    workers = {line.split()[1] for line in (out / "begun.txt").read_text("utf-8").splitlines()}
    assert len(workers) == 2
    assert two_machines.list_all_nodes()


@pytest.mark.slow
def test_what_a_killed_worker_had_begun_is_done_again(
    two_machines: Any, segmenting: ModuleType, jobs: list[Job], model_folder: Path, out: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(cluster, "BLOCK_SIZE", 4)
    options = {"seconds": 0.05, "kill": jobs[13].name}
    found = predict_on_cluster(
        jobs, out, model=str(model_folder), segment_job=segmenting.segment, options=options, precision="32"
    )
    assert (out / "killed").exists()
    _assert_complete(found, jobs, out, block=4)
    assert two_machines.list_all_nodes()


@pytest.mark.slow
def test_what_a_lost_machine_had_begun_is_done_again(
    two_machines: Any, segmenting: ModuleType, jobs: list[Job], model_folder: Path, out: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(cluster, "BLOCK_SIZE", 4)
    lost = []

    def lose() -> None:
        while not (out / "begun.txt").exists() or len({*(out / "begun.txt").read_text().split()[1::2]}) < 2:
            time.sleep(0.05)  # until both work
        lost.append(two_machines.list_all_nodes()[-1])
        two_machines.remove_node(lost[0], allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    found = predict_on_cluster(
        jobs, out, model=str(model_folder), segment_job=segmenting.segment, options={"seconds": 0.5}, precision="32"
    )
    thread.join(timeout=30)
    assert len(lost) == 1
    _assert_complete(found, jobs, out, block=4)


def _assert_complete(found: list[dict[str, Any]], jobs: list[Job], out: Path, *, block: int) -> None:
    assert [entry["image"] for entry in found] == [str(job.image) for job in jobs]
    for job in jobs:
        assert read_mask(out / f"{job.name}.png").shape == (64, 64)
    begun = Counter(_begun(out))
    assert set(begun) == {job.name for job in jobs}
    assert max(begun.values()) <= 2
    assert 1 <= sum(count - 1 for count in begun.values()) <= block


@pytest.mark.slow
def test_a_full_disk_ends_everything(
    two_machines: Any, segmenting: ModuleType, jobs: list[Job], model_folder: Path, out: Path
):
    with pytest.raises(StorageError, match="Cannot write") as caught:
        predict_on_cluster(
            jobs, out, model=str(model_folder), segment_job=segmenting.segment, options={"full": jobs[3].name}
        )
    assert caught.value.hint == "the disk is full"
    with pytest.raises(ConfigError, match="no GPU"):
        predict_on_cluster(jobs, out, model=str(model_folder), segment_job=segmenting.segment, device="cuda")
    assert two_machines.list_all_nodes()


@pytest.mark.slow
def test_without_a_cluster_this_machine_is_one(
    segmenting: ModuleType, jobs: list[Job], model_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = predict_on_cluster(jobs[:2], out, model=str(model_folder), segment_job=segmenting.segment, workers=1)
    assert [entry["prompt"] for entry in found] == [PROMPT] * 2
    assert not ray.is_initialized()
