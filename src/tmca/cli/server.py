"""A model behind HTTP and a web page."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tmca.cli.options import Device
from tmca.errors import ConfigError
from tmca.progress import say

Served = Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-m"], metavar="RUN|NAME=RUN …")]


@dataclass(frozen=True)
class Serve:
    """Answer requests and show a web page: `tmca serve -m RUN`, then open http://127.0.0.1:8000."""

    model: Served
    """Run folders, checkpoint folders or hub ids; the first is the default; one that changes is loaded again."""
    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own needs a key."""
    port: int = 8000
    """Port to listen on."""
    api_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY …")] = ()
    """Only who knows one of these may ask; everybody on the machine can read it in the list of processes."""
    api_key_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The same from a file, one a line; TMCA_API_KEYS holds further ones, separated by commas."""
    allowed_host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME …")] = ()
    """Names besides localhost under which a browser may call a server that listens on this machine only."""
    tls_certificate: Annotated[Path | None, tyro.conf.arg(metavar="FILE.pem")] = None
    """Certificate for HTTPS."""
    tls_key: Annotated[Path | None, tyro.conf.arg(metavar="FILE.pem")] = None
    """Its key."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where jobs are kept; by default `server` in TMCA_HOME."""
    page: bool = True
    """Show the web page at /."""
    max_queue: int = 64
    """Requests that may wait for an answer; one more is told to come back."""
    max_batch: int = 8
    """Sentences decoded together, at most."""
    max_upload_mb: int = 100
    """Largest request about one image, in MB."""
    deadline: float = 60.0
    """Seconds after which a request is given up."""
    keep_hours: float = 24.0
    """How long a finished job and its files are kept."""
    device: Device = "auto"
    """Where to compute."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """32: float32; bf16: faster; auto: bf16 where the device computes it and the method is known to keep its masks."""

    def run(self) -> None:
        """Serve until told to stop."""
        from tmca.files import home
        from tmca.server import ServerSettings, WorkerSettings, read_keys, serve
        from tmca.server.settings import MEGABYTE

        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("HTTPS needs a certificate and its key", hint="give --tls-certificate and --tls-key")
        for file in (self.tls_certificate, self.tls_key):
            if file is not None and not file.is_file():
                raise ConfigError(f"There is no file {file}", hint="check --tls-certificate and --tls-key")
        worker = WorkerSettings(self._models(), self.device, self.precision, self.max_batch)
        settings = ServerSettings(
            worker=worker,
            data=self.data_dir or home() / "server",
            host=self.host,
            port=self.port,
            keys=(*self.api_key, *read_keys(self.api_key_file)),
            allowed_hosts=self.allowed_host,
            page=self.page,
            max_queue=self.max_queue,
            deadline=self.deadline,
            max_upload=self.max_upload_mb * MEGABYTE,
            keep_hours=self.keep_hours,
        )
        if "TMCA_LOG_LEVEL" not in os.environ:
            logging.getLogger("tmca.server").setLevel(logging.INFO)  # a line a request, without paths and sentences
        scheme = "http" if self.tls_certificate is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        say(f"Loading {', '.join(worker.models)} …")
        serve(
            settings,
            certificate=None if self.tls_certificate is None else str(self.tls_certificate),
            key=None if self.tls_key is None else str(self.tls_key),
            announce=f"{scheme}://{host}:{self.port}",
        )

    def _models(self) -> dict[str, str]:
        models: dict[str, str] = {}
        for item in self.model:
            name, equals, source = item.partition("=")
            if not equals:
                name, source = Path(item.rstrip("/")).name, item
            if name in models:
                raise ConfigError(f"Two models are called {name!r}", hint="name them: -m first=RUN second=RUN")
            if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ConfigError(f"A model cannot be called {name!r}", hint="use letters, digits, - _ .")
            models[name] = source
        return models
