"""What the verbs share: flags that look the same everywhere, and printing a result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

Model = Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="RUN")]
Data = Annotated[Path, tyro.conf.arg(metavar="MANIFEST|FOLDER")]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
Device = Annotated[str, tyro.conf.arg(aliases=["-d"], metavar="{auto,cpu,cuda,cuda:N,mps}")]
PromptLevel = Annotated[str, tyro.conf.arg(metavar="p0…p9")]


def show(content: Any) -> None:  # noqa: ANN401
    """Print a result, text or a table, to stdout."""
    Console(highlight=False, soft_wrap=isinstance(content, str)).print(content, markup=False)
