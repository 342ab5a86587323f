"""What the verbs share: flags that look the same everywhere, and printing a result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

Model = Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="RUN")]
Models = Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-m"], metavar="RUN …")]
Data = Annotated[Path, tyro.conf.arg(metavar="MANIFEST|FOLDER")]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
Device = Annotated[str, tyro.conf.arg(aliases=["-d"], metavar="{auto,cpu,cuda,cuda:N,mps}")]
PromptLevel = Annotated[str, tyro.conf.arg(metavar="p0…p9")]

WIDEST = 1000


def show(content: Any, *, whole: bool = False) -> None:  # noqa: ANN401
    """Print a result, text or a table, to stdout.

    Args:
        content: Text, or a table, which is fitted to the terminal.
        whole: Leave a table as wide as it is, so that no number is cut.
    """
    console = Console(highlight=False, soft_wrap=isinstance(content, str | Text))
    if whole:
        natural = Measurement.get(console, console.options.update(max_width=WIDEST), content).maximum
        console.width = max(console.width, natural)
    console.print(content, markup=False)
