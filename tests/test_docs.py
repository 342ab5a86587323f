"""The documentation is true: what it names exists, what it shows runs."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tmca import cli, errors
from tmca.batch import predict_batch
from tmca.comparison import compare
from tmca.comparison_report import write_comparison
from tmca.config import Experiment, ImageEncoderConfig, ModelConfig, to_dict
from tmca.data.manifest import COLUMNS, Manifest
from tmca.data.phantom import write_phantoms
from tmca.demo import run_demo
from tmca.evaluation import evaluate
from tmca.evaluation.reading import read_runs
from tmca.evaluation.writing import write_ledger
from tmca.inference import Predictor
from tmca.jobs import find_images, make_jobs
from tmca.models import build_model
from tmca.models.tokenizer import SentenceTokenizer
from tmca.presets import PRESETS, get_preset
from tmca.reproduction import Data, plan
from tmca.reproduction.ledger import Ledger
from tmca.reproduction.tables import get_table
from tmca.server import ServerSettings, WorkerSettings, api, kserve, operations, problems
from tmca.server.service import Service

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
DOTTED = re.compile(r"tmca(?:\.\w+)+")


def _text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _inline_code(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _section(text: str, heading: str) -> str:
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,3}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no section {heading!r}"
    return found[2]


def _commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in _blocks(page.read_text("utf-8"), "sh"):
            lines = [line.partition("#")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
            found += [line for line in lines if re.match(r"(\.venv/bin/)?tmca ", line)]
    return sorted(set(found))


def _resolve(dotted: str) -> Any:
    """Return what a dotted name stands for: the longest importable module, then attributes."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        if not _is_module(name):
            continue
        found: Any = importlib.import_module(name)
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AttributeError(dotted)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _field_exists(dotted: str) -> bool:
    cls: Any = Experiment
    for part in dotted.split("."):
        if not dataclasses.is_dataclass(cls) or part not in {item.name for item in dataclasses.fields(cls)}:
            return False
        cls = typing.get_type_hints(cls)[part]
    return True


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as `tmca demo` leaves it, tiny."""
    folder = tmp_path_factory.mktemp("docs") / "demo"
    preset = get_preset("tiny")
    experiment = dataclasses.replace(preset, trainer=dataclasses.replace(preset.trainer, max_epochs=1))
    run_demo(folder, counts={"train": 8, "val": 4, "test": 8}, experiment=experiment)
    return folder


# --- what the pages name ------------------------------------------------------------------------------------------


def test_every_dotted_name_of_the_method_table_resolves():
    rows = _rows(_section(_text("docs/concepts/method.md"), "From the paper to the code"))[2:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tmca[\w.]+)`", row[-1])
        assert named, row
        for name in named:
            assert _resolve(name) is not None


def test_every_equation_is_mapped():
    rows = _rows(_section(_text("docs/concepts/method.md"), "From the paper to the code"))[2:]
    mapped = {number for row in rows for number in re.findall(r"Eq\. (\d)", row[0])}
    assert mapped == {"1", "2", "3", "4"}


@pytest.mark.parametrize("page", NAMES)
def test_dotted_names_resolve(page: str):
    for name in DOTTED.findall(" ".join(_inline_code(_text(page)))):
        assert _resolve(name) is not None, name


@pytest.mark.parametrize("page", NAMES)
def test_verbs_exist(page: str):
    text = _text(page)
    code = [*_inline_code(text), *(line for block in _blocks(text, r"\w*") for line in block.splitlines())]
    for piece in code:
        command = re.match(r"\s*(?:\.venv/bin/)?tmca ([a-z][a-z-]*)(?: ([a-z]+))?", piece)
        assert not command or command[1] in cli.VERBS or f"{command[1]} {command[2]}" in cli.VERBS, piece


def test_the_commands_that_are_shown_are_accepted():
    """All in one other process, where the parser meets the dataclasses as users' commands do."""
    program = """
import json, shlex, sys
from tmca import cli
for command in json.load(sys.stdin):
    words = [word for word in shlex.split(command.partition(' > ')[0])[1:] if word not in cli.GLOBAL_FLAGS]
    print(command, file=sys.stderr)
    verb, rest = cli._verb(words)
    assert type(cli._parse(verb, rest)) is cli.VERBS[verb]
"""
    commands = _commands()
    assert len(commands) > 15
    result = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(commands), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr + result.stdout


@pytest.mark.parametrize("page", NAMES)
def test_presets_exist(page: str):
    text = _text(page)
    named = re.findall(r"\btmca (?:train|presets show) ([a-z][\w-]*)", text)
    kinds = {name.partition("-")[0] for name in PRESETS}
    named += [code for code in _inline_code(text) if re.fullmatch(rf"({'|'.join(kinds)})(-[a-z0-9]+)+", code)]
    flags = {item.name.replace("_", "-") for item in dataclasses.fields(ModelConfig)}
    others = {"tmca-run", "tmca-bundle", "tmca-export"}  # a program and two formats
    assert set(named) - flags - others <= set(PRESETS)


def test_every_preset_is_in_the_guide():
    rows = _rows(_section(_text("docs/how-to/train-on-your-data.md"), "2. Choose a preset"))[2:]
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row[0])} == set(PRESETS)


@pytest.mark.parametrize("page", NAMES)
def test_config_fields_exist(page: str):
    sections = {item.name for item in dataclasses.fields(Experiment) if item.name not in ("name", "seed")}
    for code in _inline_code(_text(page)):
        for name in re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})(?:\.\w+)+)", code):
            assert name.endswith(".safetensors") or _field_exists(name), name


def test_fields_of_the_decisions_exist():
    rows = [row for row in _rows(_text("docs/decisions.md")) if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert row[-1] == "none" or "`" in row[-1]
        for name in re.findall(r"`([\w.]+)`", row[-1]):
            assert _field_exists(name), name


def test_decisions_that_are_cited_exist():
    known = {int(row[0]) for row in _rows(_text("docs/decisions.md")) if row[0].isdigit()}
    cited = re.findall(r"^- \*\*([\d, ]+)\*\*", _text("docs/concepts/method.md"), re.MULTILINE)
    assert {int(number) for group in cited for number in group.split(",")} <= known


def test_the_flags_in_the_reference_are_those_of_the_verbs():
    text = _text("docs/reference/cli.md")
    common = {"help"}
    for verb, command in cli.VERBS.items():
        flags = (item for item in dataclasses.fields(command) if "Positional" not in str(item.type))
        fields = {item.name.replace("_", "-") for item in flags}
        if verb.startswith(("presets", "models")):
            continue
        listed = set(
            re.findall(r"`--([a-z][a-z0-9-]+)`", _section(text, f"tmca {verb}").partition("\nThe sections")[0])
        )
        if verb == "train":
            fields = (fields - {"experiment"}) | {"seed"}
        assert listed - common == fields, verb


def test_exit_codes_are_those_of_the_errors():
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
    codes = {cls.exit_code for cls in classes if issubclass(cls, errors.TMCAError)} | {0, errors.EXIT_INTERRUPTED}
    rows = _rows(_section(_text("docs/reference/cli.md"), "Exit codes"))[2:]
    assert {int(row[0]) for row in rows} == codes


def test_the_http_reference_has_every_path_error_and_figure(tmp_path: Path):
    text = _text("docs/reference/http.md")
    service = Service(ServerSettings(WorkerSettings({"model": "nowhere"}), tmp_path))
    routers = (api.router, kserve.router, operations.router)
    paths = {f"{method} {route.path}" for router in routers for route in router.routes for method in route.methods}
    documented = {code for code in _inline_code(text) if re.match(r"(GET|POST|DELETE) /\w+", code)}
    assert documented == paths
    codes = {cls.code for cls in subclasses(errors.TMCAError) if cls.__module__.startswith("tmca.server.")}
    codes -= {problems.ClientGoneError.code, errors.TMCAError.code}  # nobody reads the one, the other is every fault
    table = {code for row in _rows(_section(text, "Errors"))[2:] for code in re.findall(r"`(\w+)`", row[1])}
    assert codes <= table
    figures = set(re.findall(r"^# TYPE (\w+)", service.metrics.text({}).decode(), re.MULTILINE))
    named = {name for row in _rows(_section(text, "Metrics"))[2:] for name in re.findall(r"`(tmca_\w+)`", row[0])}
    service.store.close()
    assert named == {name for name in figures if not name.endswith("_created")}


def subclasses(cls: type[errors.TMCAError]) -> set[type[errors.TMCAError]]:
    return {cls} | {found for each in cls.__subclasses__() for found in subclasses(each)}


def test_the_python_reference_has_every_public_name():
    import tmca

    before, after = _text("docs/reference/python.md").split("## Add a method")
    extending, _, after = after.partition("\n## ")
    named = re.findall(r"^::: (\S+)", before + after, re.MULTILINE)
    assert {name.rpartition(".")[2] for name in named} == set(tmca.__all__)
    for name in named:
        assert _resolve(name) is getattr(tmca, name.rpartition(".")[2])
    for name in re.findall(r"^::: (\S+)", extending, re.MULTILINE):
        assert inspect.getdoc(_resolve(name))


def test_the_layers_are_those_of_the_import_contract():
    contract = tomllib.loads(_text("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]["layers"]
    written = _blocks(_section(_text("docs/architecture.md"), "Import rule"), "text")[0]
    layers = [re.findall(r"\w+", layer) for layer in contract]
    assert [re.findall(r"\w+", line.replace("(planned)", "")) for line in written.splitlines()] == layers
    for name in re.findall(r"(\w+) \(planned\)", written):
        assert not _is_module(f"tmca.{name}")


def test_the_layout_names_every_module():
    layout = _blocks(_section(_text("docs/architecture.md"), "Layout"), "text")[0]
    existing, planned, folders = set(), set(), [""]
    for line in layout.splitlines()[1:]:
        match = re.match(r"((?:[│ ]   )*)[├└]── ([\w.]+)(/?)\s*(planned)?", line)
        assert match, line
        depth = len(match[1]) // 4
        name = f"{folders[depth]}{match[2]}{match[3]}"
        if match[3]:
            folders[depth + 1 :] = [name]
        (planned if match[4] else existing).add(name)
    source = ROOT / "src" / "tmca"
    modules = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    bare = {"data/__init__.py", "imaging/__init__.py"}
    assert {name for name in existing if name.endswith(".py")} == modules - bare
    assert not {name for name in planned if (source / name).exists()}


# --- numbers and fields -------------------------------------------------------------------------------------------


def test_the_parameter_counts_are_right():
    text = _section(_text("docs/concepts/method.md"), "Parameters")
    config = get_preset("tmca").model
    encoder = ImageEncoderConfig(weights="none", architecture="convnext")
    tokenizer = SentenceTokenizer.learn(["one polyp"], vocabulary_size=100, max_tokens=config.text_encoder.max_tokens)
    # The trained parts depend on the text encoder's width only; its own size is counted without memory for it.
    small_bert = {"vocab_size": 100, "num_hidden_layers": 3, "intermediate_size": 8}
    model = build_model(
        dataclasses.replace(config, image_encoder=encoder),
        tokenizer=tokenizer,
        text_architecture=small_bert,
        load_weights=False,
    )

    def millions(*modules: torch.nn.Module) -> float:
        return sum(value.numel() for module in modules for value in module.parameters() if value.requires_grad) / 1e6

    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        bert = BertModel(BertConfig(vocab_size=30_522), add_pooling_layer=False)
    expected = {
        "image encoder": millions(model.image_encoder),
        "decoder and head": millions(model.decoder, model.head),
        "projection heads": millions(model.alignment),
        "text encoder": millions(bert),
        "**sum**": millions(model),
    }
    rows = {row[0].partition(" (")[0]: row for row in _rows(text)[2:]}
    assert set(rows) == set(expected)
    for part, number in expected.items():
        assert f"{number:.2f}" in " ".join(rows[part]), part
    stages = [model.decoder[stride] for stride in ("32", "16", "8")]
    assert " + ".join(f"{millions(stage):.2f}" for stage in stages) in text
    assert f"{millions(model.image_encoder, model.decoder, model.head):.2f} trained" in text


def _fields(heading: str) -> set[str]:
    rows = _rows(_section(_text("docs/reference/files.md"), heading))[2:]
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    return {name for name in names if "." not in name}


def _header(path: Path) -> set[str]:
    with path.open(encoding="utf-8", newline="") as stream:
        return set(next(csv.reader(stream)))


def _keys(path: Path) -> set[str]:
    return set(json.loads(path.read_text("utf-8")))


def test_the_fields_of_the_files_are_documented(demo: Path):
    run, best = demo / "run", demo / "run" / "checkpoints" / "best"
    for heading, path in (
        ("splits.json", run / "splits.json"),
        ("environment.json", run / "environment.json"),
        ("config.json", best / "config.json"),
        ("summary.json", demo / "summary.json"),
        ("demo.json", demo / "demo.json"),
    ):
        assert _fields(heading) == _keys(path), heading
    protocol = json.loads((demo / "summary.json").read_text("utf-8"))["protocol"]
    documented = re.findall(r"`protocol\.(\w+)`", _text("docs/reference/files.md"))
    assert set(documented) == set(protocol)
    assert _fields("Manifest") == set(COLUMNS)
    with (demo / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        assert _fields("metrics.csv of an evaluation") == set(next(csv.reader(stream)))
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        columns = set(next(csv.reader(stream)))
    losses = _fields("metrics.csv of a run") & {name.removeprefix("train_") for name in columns}
    assert {f"train_{name}" for name in losses} | {"epoch", "seconds", "learning_rate"} >= {
        name for name in columns if not name.startswith("val_")
    }


def test_the_fields_of_a_prediction_and_of_the_ledger_are_documented(demo: Path, tmp_path: Path):
    predictor = Predictor.from_pretrained(demo / "run", "cpu")
    jobs = make_jobs(find_images([demo / "data" / "images" / "test-00000.png"]), "one small lesion")
    predict_batch(predictor, jobs, tmp_path / "masks")
    report = json.loads((tmp_path / "masks" / "run_report.json").read_text("utf-8"))
    section = _section(_text("docs/reference/files.md"), "run_report.json")
    fields, entries = section.split("Each of `cases`")
    for part, keys in ((fields, set(report)), (entries, set(report["cases"][0]))):
        assert {name for row in _rows(part)[2:] for name in re.findall(r"`(\w+)`", row[0])} - {"series_uid"} == keys
    manifest = Manifest.read(demo / "data" / "manifest.csv")
    evaluation = evaluate(predictor.model, manifest, surface_tolerance=2.0)
    write_ledger(evaluation, demo / "run", manifest, "phantoms", tmp_path / "results" / "a.json")
    assert _fields("Results ledger") == _keys(tmp_path / "results" / "a.json")
    surface = _fields("Fields of surface")
    assert surface == set(evaluation.protocol()["surface"])
    columns = surface - {"n_hd95", "n_surface_dice"}
    documented = _fields("metrics.csv of an evaluation") - {"text"}
    assert documented | columns == _header(tmp_path / "results" / "a.csv")


def test_the_fields_of_a_comparison_are_documented(tmp_path: Path):
    runs = read_runs([ROOT / "results" / "kvasir-mobile.json", ROOT / "results" / "kvasir-mobile-ariadne.json"])
    write_comparison(compare(runs), tmp_path)
    assert _fields("comparison.csv") == _header(tmp_path / "comparison.csv")
    assert _fields("comparison.json") == _keys(tmp_path / "comparison.json")
    listed = json.loads((tmp_path / "comparison.json").read_text("utf-8"))["runs"][0]
    (row,) = [row for row in _rows(_section(_text("docs/reference/files.md"), "comparison.json")) if row[0] == "`runs`"]
    assert set(re.findall(r"`(\w+)`", row[1])) == set(listed)


# --- what the pages show ------------------------------------------------------------------------------------------


def test_the_comparison_shown_is_the_one_of_the_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(ROOT)
    page = _text("docs/how-to/compare-models.md")
    (command,) = [line for block in _blocks(page, "sh") for line in block.splitlines() if "--cases" in line]
    assert cli.run(command.split()[1:]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert _blocks(page, "text")[0].strip() == printed.strip()


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/first-segmentation.md"])
def test_the_python_snippets_run(page: str, demo: Path):
    (code,) = _blocks(_text(page), "python")
    assert '"demo/run"' in code
    names: dict[str, Any] = {}
    exec(code.replace('"demo/', f'"{demo.as_posix()}/'), names)
    masks = [value for value in names.values() if isinstance(value, np.ndarray)]
    assert masks
    assert all(mask.shape == (64, 64) and mask.dtype == np.bool_ for mask in masks)


def test_the_sentence_of_the_snippet_is_true_in_the_demo(tmp_path: Path):
    path, sentence = re.findall(r'"(demo/data/images/[^"]+)"\)\n.*predict\("([^"]+)"', _text("README.md"))[0]
    name = Path(path).stem
    size = get_preset("demo").preprocessing.image_size
    manifest = write_phantoms(tmp_path / "data", {"test": int(name.partition("-")[2]) + 1}, size=size, seed=1)
    assert manifest.select([name]).records[0].text == sentence


@pytest.mark.parametrize("page", NAMES)
def test_links_within_the_repository_lead_somewhere(page: str):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", _text(page)):
        if target != "docs/images/demo.png":  # drawn by docs/draw_figure.py
            assert ((ROOT / page).parent / target).exists(), target


def test_the_manifests_shown_can_be_read(tmp_path: Path):
    shown = [block for page in NAMES for block in _blocks(_text(page), "csv") if block.startswith("image,mask")]
    assert len(shown) == 2
    for block in shown:
        (tmp_path / "manifest.csv").write_text(block, encoding="utf-8")
        assert len(Manifest.read(tmp_path / "manifest.csv").records) == 2


# --- the results tables -------------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return docs/tables.py, working on a copy of the pages."""
    specification = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for page in module.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / page, tmp_path / page)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def _entry(name: str, **model: Any) -> dict[str, Any]:
    experiment = json.loads(json.dumps(dataclasses.asdict(get_preset(name))))
    experiment["model"] |= model
    scores = {"pooled": {"dice": 0.5}, "per_case_mean": {"dice": 0.25}}
    metrics = {"pooled": {"dice": 0.9}, "per_case_mean": {"dice": 0.8, "empty_policy": "one"}}
    space = str(experiment["preprocessing"]["image_size"])
    metrics |= {"ci95": {"pooled_dice": [0.85, 0.95]}, "threshold": 0.5, "space": space}
    return {
        "name": name, "preset": name, "experiment": experiment, "dataset": "kvasir_polyp", "data_hash": "a" * 64,
        "split": "test", "n": 100, "n_train": 800, "seed": 1,
        "epochs": 40, "seconds": 3000.0, "metrics": metrics,
        "text_ablation": {"shuffled": scores, "contradictory": scores, "none": scores},
    }  # fmt: skip


def test_the_results_tables_are_those_of_the_results(tables: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "ROOT", ROOT)
    for page in tables.PAGES:
        assert len(tables.BLOCK.findall(_text(page))) == _text(page).count("results:begin") > 0
    assert tables.main(["--check"]) == 0


def test_a_stale_table_is_found_and_rewritten(tables: ModuleType, tmp_path: Path):
    entries = [_entry("kvasir-mobile"), _entry("kvasir-mobile-ariadne"), _entry("kvasir-mobile-image-only")]
    entries[2]["text_ablation"] = {}
    for entry in entries:
        (tmp_path / "results" / f"{entry['name']}.json").write_text(json.dumps(entry), encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    blocks = {found[2]: found[0] for found in tables.BLOCK.finditer((tmp_path / "docs/findings.md").read_text("utf-8"))}
    rows = _rows(blocks["runs"])
    assert [row[-1] for row in rows[2:]] == ["0.922", "0.893", "n/a"]
    assert rows[2][:4] == ["kvasir-mobile", "kvasir_polyp, test (100)", "800", "40"]
    assert rows[2][4:7] == ["50", "**0.900** [0.850, 0.950]", "0.800"]
    assert rows[4][-4:-1] == ["n/a", "n/a", "n/a"]


def test_a_sweep_has_a_line_a_form_and_a_column_a_seed(tables: ModuleType, tmp_path: Path):
    assert tables.content("sweep polyps", Ledger(tmp_path)) == "Not measured yet."
    runs = [("lungs", "no alignment", 1), ("polyps", "mask", 2), ("polyps", "no alignment", 1), ("polyps", "mask", 1)]
    scored = [
        {"data": data, "form": form, "seed": seed, "pooled": {"right": 0.9 + seed / 100}, "per_case": 0.8}
        for data, form, seed in runs
    ]
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/alignment_sweep.json").write_text(json.dumps(scored), encoding="utf-8")
    assert _rows(tables.content("sweep polyps", Ledger(tmp_path)))[2:] == [
        ["no alignment", "0.910 / 0.800", ""],
        ["mask", "0.910 / 0.800", "0.920 / 0.800"],
    ]


def test_the_runs_of_a_table_are_shown_there(tables: ModuleType, tmp_path: Path):
    runs = plan(get_table("table2"), Data("kvasir_polyp", "a" * 64, 800), "cpu", [1, 2])
    for run in (run for run in runs if run.row.preset in ("tmca", "ariadne")):
        entry = _entry("tmca") | {"experiment": to_dict(run.experiment), "seed": run.experiment.seed, "name": run.name}
        scores = {"dice": 0.9, "jaccard": 0.82, "accuracy": 0.98}
        space = str(run.experiment.preprocessing.image_size)
        entry["metrics"] |= {"pooled": scores, "per_case_mean": scores | {"empty_policy": "one"}, "space": space}
        (tmp_path / "results" / f"{run.name}.json").write_text(json.dumps(entry), encoding="utf-8")
    ledger = Ledger(tmp_path / "results")
    rows = _rows(tables.content("table2 kvasir_polyp cpu", ledger))
    assert [(row[0], row[2], row[6]) for row in rows[2:]] == [
        ("TMCA", "90.00 ± 0.00", "2"),
        ("-Contrastive Alignment", "90.00 ± 0.00", "2"),
    ]
    assert tables.content("runs", ledger) == tables.NOTHING
    assert tables.content("table1 qata_cov19 cpu", ledger) == tables.NOTHING


def test_the_papers_value_stands_beside_its_own_method_only(tables: ModuleType):
    assert tables.paper_value(_entry("tmca")) == "0.922"
    assert tables.paper_value(_entry("ariadne")) == "0.893"
    for other in ("tmca-without-tsdm", "tmca-without-ltem", "tmca-levels-g", "image-only"):
        assert tables.paper_value(_entry(other)) == tables.ABSENT
    part = _entry("tmca")
    part["experiment"]["trainer"]["train_fraction"] = 0.25
    assert tables.paper_value(part) == tables.ABSENT
    assert tables.paper_value(_entry("tmca") | {"dataset": "phantoms"}) == tables.ABSENT
    assert tables.paper_value(_entry("tmca") | {"dataset": "qata_cov19"}) == "0.909"


def test_scoring_needs_no_training_stack():
    program = "import sys, tmca.runs; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
