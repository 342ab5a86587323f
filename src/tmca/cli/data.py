"""Datasets: draw."""

from __future__ import annotations

from dataclasses import dataclass

from tmca.cli.options import Output, show


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
