"""What a server is started with."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from tmca.errors import ConfigError, DataError
from tmca.server.messages import WorkerSettings

MEGABYTE = 2**20
SHORTEST_KEY = 16
LAST_PORT = 65_535


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with.

    Attributes:
        worker: Models, device, and how they are asked.
        data: Folder for jobs.
        host: Address to listen on.
        port: Port to listen on.
        keys: Who knows one of these may ask; none: everybody on this machine.
        allowed_hosts: Further names under which a browser may call this server.
        page: Serve the web page at ``/``.
        max_queue: Requests that may wait for an answer.
        deadline: Seconds after which a request is given up.
        max_upload: Bytes of a request about one image.
        max_job_upload: Bytes of a job's files.
        upload_seconds: In which a request must have arrived.
        max_prompts: Sentences about one image in a request.
        max_jobs: Jobs that may wait.
        keep_hours: How long a finished job is kept.
        stop_seconds: How long requests may take to end when the server stops.
    """

    worker: WorkerSettings
    data: Path
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    page: bool = True
    max_queue: int = 64
    deadline: float = 60.0
    max_upload: int = 100 * MEGABYTE
    max_job_upload: int = 4096 * MEGABYTE
    upload_seconds: float = 120.0
    max_prompts: int = 16
    max_jobs: int = 100
    keep_hours: float = 24.0
    stop_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= LAST_PORT:
            raise ConfigError(f"There is no port {self.port}", hint=f"choose one of 1 to {LAST_PORT}")
        if any(len(key) < SHORTEST_KEY for key in self.keys):
            raise ConfigError(
                f"A key has fewer than {SHORTEST_KEY} characters", hint="`openssl rand -hex 32` makes one"
            )
        if not self.keys and not self.is_local:
            raise ConfigError(
                f"Without a key, everybody who reaches {self.host} could ask the server",
                hint="give --api-key-file, or listen on 127.0.0.1",
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the keys of a file, one a line, and those of ``TMCA_API_KEYS``, separated by commas.

    Raises:
        DataError: The file cannot be read or holds no key.
    """
    keys = [key.strip() for key in os.environ.get("TMCA_API_KEYS", "").split(",")]
    if path is not None:
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"The keys in {path} cannot be read", hint="write one key a line") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise DataError(f"{path} holds no key", hint="write one key a line")
        keys += found
    return tuple(key for key in keys if key)
