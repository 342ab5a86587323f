"""nnU-Net's environment: made, looked at, and its commands run.

nnU-Net lives in an environment of its own, so that what it requires never meets what tmca requires. The environment
sees the packages of the one that runs tmca, so that torch is neither downloaded twice nor there in two versions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tmca.errors import ConfigError, OutOfMemoryError, StorageError, TMCAError, WeightsError
from tmca.files import held, home, storage_error, write_json, write_text
from tmca.models.weights import is_offline
from tmca.progress import say

VERSION = "2.8.1"
PINNED = (
    f"nnunetv2=={VERSION}",
    "dynamic-network-architectures==0.4.4",
    "acvl-utils==0.2.6",
    "batchgenerators==0.25.5",
    "batchgeneratorsv2==0.3.6",
)
"""nnU-Net's own packages, installed without what they ask for: that includes timm, and with it torchvision, which only
networks need that are not used here."""
REQUIRED = (
    "SimpleITK",
    "blosc2",
    "connected-components-3d",
    "matplotlib",
    "nibabel",
    "pandas",
    "scikit-image",
    "scikit-learn",
    "seaborn",
    "tifffile",
    "tqdm",
)
"""What they need to plan, train in two dimensions, and predict."""
COMMANDS = {
    "plan": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry",
    "train": "nnunetv2.run.run_training:run_training_entry",
    "predict": "nnunetv2.inference.predict_from_raw_data:predict_entry_point",
}
MARKER = "engine.json"
SPOKEN = "tmca: "
"""Begins the lines of a command's output that the user sees."""
_SHOWN_LINES = 3
_SECONDS_TO_STOP = 10.0

_START = """
import os, signal, threading
from {module} import {function}
def end_with_tmca():
    os.read(0, 1)  # nothing is ever written: this returns when tmca has ended, however that came about
    os.killpg(0, signal.SIGTERM)
threading.Thread(target=end_with_tmca, daemon=True).start()
{function}()
"""

_PROBE = f"""
import importlib, importlib.metadata, json
for command in {list(COMMANDS.values())!r}:
    importlib.import_module(command.partition(":")[0])
names = {[name.partition("==")[0] for name in PINNED]!r} + ["torch", "numpy"]
print(json.dumps({{name: importlib.metadata.version(name) for name in names}}))
"""


@dataclass(frozen=True)
class EngineStatus:
    """Whether nnU-Net can be run.

    Attributes:
        folder: Its environment.
        installed: It is complete and of the version this tmca wants.
        versions: Package → version, of an environment that is complete.
    """

    folder: Path
    installed: bool
    versions: dict[str, str]


def status() -> EngineStatus:
    """Return whether nnU-Net is installed, without starting it."""
    folder = home() / "engines" / "nnunet"
    try:
        marker = json.loads((folder / MARKER).read_text("utf-8"))
        versions, shared = dict(marker["versions"]), [Path(path) for path in marker["shared"]]
    except (OSError, ValueError, KeyError, TypeError):
        return EngineStatus(folder, installed=False, versions={})
    fits = versions.get("nnunetv2") == VERSION and all(path.is_dir() for path in (*shared, _site_packages(folder)))
    return EngineStatus(folder, fits and _python(folder).exists(), versions)


def install(wheels: Path | None = None) -> bool:
    """Make nnU-Net's environment in ``$TMCA_HOME/engines/nnunet``; what an interrupted try left is replaced.

    Args:
        wheels: Folder of downloaded packages to install from, without a network.

    Returns:
        Whether there was anything to do.

    Raises:
        ConfigError: There is no such folder.
        StorageError: Another process installs it, or it cannot be written.
        WeightsError: Offline, or a package cannot be had; says what to do.
        TMCAError: Python cannot make environments here.
    """
    found = status()
    if found.installed:
        return False
    if wheels is not None and not wheels.is_dir():
        raise ConfigError(f"There is no folder {wheels}", hint="name the folder that holds the packages of nnU-Net")
    if is_offline() and wheels is None:
        raise WeightsError(
            "nnU-Net is not installed and offline mode is on",
            hint="install it while connected, or bring its packages over: tmca models install nnunet --wheels FOLDER",
        )
    engines = found.folder.parent
    try:
        engines.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(engines, error) from error
    with held(engines, StorageError("nnU-Net is being installed by another process", hint="wait for it to end")):
        say(f"Installing nnU-Net {VERSION} into {found.folder}; it takes a few minutes and 600 MB")
        _install(found.folder, wheels)
    return True


def _install(folder: Path, wheels: Path | None) -> None:
    log = folder.with_name("nnunet-install.log")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        _build(folder, log, wheels)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def require() -> EngineStatus:
    """Return the status of an nnU-Net that is installed.

    Raises:
        WeightsError: It is not.
    """
    found = status()
    if not found.installed:
        raise WeightsError("nnU-Net is not installed", hint="run `tmca models install nnunet`")
    return found


def run(command: str, arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
    """Run a command of nnU-Net to its end; when this is interrupted, or its process dies, so does the command.

    Args:
        command: One of :data:`COMMANDS`.
        arguments: Its arguments.
        variables: Environment variables, besides those of this process.
        log: File to which its output is added; lines that begin with :data:`SPOKEN` are also shown.

    Raises:
        WeightsError: nnU-Net is not installed.
        OutOfMemoryError: It ran out of memory.
        TMCAError: It failed; the end of its output says why.
    """
    folder = require().folder
    _place_trainer(folder)
    module, _, function = COMMANDS[command].partition(":")
    start = [str(_python(folder)), "-c", _START.format(module=module, function=function), *arguments]
    code, last = _follow(start, _environment() | dict(variables), log)
    if code == 0:
        return
    said, hint = _end_of(last), f"all of its output is in {log}"
    whole = "\n".join(last).lower()
    if code == -signal.SIGKILL or any(words in whole for words in ("out of memory", "out of ram")):
        hint = f"set model.options.batch_size to a smaller number; {hint}"
        raise OutOfMemoryError(f"nnU-Net ran out of memory and could not {command}: {said}", hint=hint)
    raise TMCAError(f"nnU-Net could not {command}: {said}", hint=hint)


def _build(folder: Path, log: Path, wheels: Path | None) -> None:
    python = str(_python(folder))
    code, last = _follow([sys.executable, "-m", "venv", str(folder)], _environment(), log)
    if code:
        raise TMCAError(
            f"Python cannot make an environment: {_end_of(last)}",
            hint="install its venv module (Debian, Ubuntu: apt install python3-venv)",
        )
    shared = _shared_packages()
    write_text(_site_packages(folder) / "tmca_shared.pth", "".join(f"{path}\n" for path in shared))
    source = [] if wheels is None else ["--no-index", "--find-links", str(wheels.resolve())]
    for packages in (["--no-deps", *PINNED], list(REQUIRED)):
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *source, *packages]
        code, last = _follow(pip, _environment(), log)
        if code:
            hint = "check the connection and try again" if wheels is None else f"see that {wheels} holds every package"
            raise WeightsError(
                f"pip could not install nnU-Net: {_end_of(last)}", hint=f"{hint}; all of pip's output is in {log}"
            )
    code, last = _follow([python, "-c", _PROBE], _environment(), log)
    if code:
        raise TMCAError(f"nnU-Net is installed but does not start: {_end_of(last)}", hint=f"see {log}")
    versions = next(line for line in reversed(last) if line.startswith("{"))
    write_json(folder / MARKER, {"versions": json.loads(versions), "shared": [str(path) for path in shared]})


def _follow(command: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[int, list[str]]:
    """Run a program, log its output, and return its exit code and last lines."""
    last: deque[str] = deque(maxlen=50)
    try:
        stream = log.open("a", encoding="utf-8")
    except OSError as error:
        raise storage_error(log, error) from error
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.PIPE,  # held open for as long as this process lives, see _START
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # so that its worker processes can be stopped with it
    )
    ended = threading.Event()
    threading.Thread(target=_stop_orphans, args=(process, ended), daemon=True).start()
    with stream, process:
        try:
            for line in process.stdout or ():
                stream.write(line)
                last.append(line.rstrip())
                if line.startswith(SPOKEN):
                    say(line.removeprefix(SPOKEN).rstrip())
        except BaseException:
            _stop(process)
            raise
        finally:
            ended.set()
    return process.returncode, list(last)


def _stop_orphans(process: subprocess.Popen[str], ended: threading.Event) -> None:
    """Stop the workers of a program that has died: they hold its output open, whose end would never come."""
    process.wait()
    if not ended.wait(_SECONDS_TO_STOP):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _stop(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_SECONDS_TO_STOP)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _end_of(lines: Sequence[str]) -> str:
    """Return the last words of a program in one line: its errors, or whatever it said."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if re.match(r"[\w.]*error\b", line, re.IGNORECASE)]
    return " | ".join((errors or said)[-_SHOWN_LINES:]) or "it said nothing"


def _environment() -> dict[str, str]:
    """Return the environment of this process without what would lead another Python astray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}


def _shared_packages() -> list[Path]:
    """Return the folders this Python finds its packages in."""
    paths = {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}
    for name in ("torch", "numpy"):
        specification = importlib.util.find_spec(name)
        if specification is not None and specification.origin is not None:
            paths.add(Path(specification.origin).parents[1])
    return sorted(paths)


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _site_packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _place_trainer(folder: Path) -> None:
    """Put our trainer among nnU-Net's, unless the one that is there is the same."""
    source = Path(__file__).with_name("trainer.py").read_text("utf-8")
    target = _site_packages(folder) / "nnunetv2" / "training" / "nnUNetTrainer" / "tmca_trainer.py"
    if not target.is_file() or target.read_text("utf-8") != source:
        write_text(target, source)
