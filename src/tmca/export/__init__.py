"""Trained models for other runtimes, behind a gate: what does not give the model's masks is not written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import tmca_run
from tmca.checkpoints import model_card, resolve_checkpoint
from tmca.errors import ConfigError, StorageError
from tmca.export.bundle import TOKENIZER, Bundle, open_bundle, pack
from tmca.export.description import (
    MAKERS,
    RUNNERS,
    bill_of_materials,
    describe_export,
    describe_licences,
    tmca_licence,
    versions,
)
from tmca.export.graphs import LOGITS, WHOLE, Graph, cut_graphs
from tmca.export.onnx import to_onnx
from tmca.export.openvino import COMPILE_WITH, openvino_graph, to_openvino
from tmca.export.parity import (
    IMAGES,
    LEAST_DICE,
    LEAST_DICE_INT8,
    Cases,
    Parity,
    measure_parity,
    open_cases,
    require_parity,
)
from tmca.export.quantise import is_quantised, quantise
from tmca.files import replace_file, replace_folder, require_writable, write_bytes, write_json
from tmca.inference import Predictor
from tmca_run import Segmenter, WordPieces, onnx_graph

FOLDER_FORMAT = "tmca-export"
MANIFEST, GRAPHS = "manifest.json", "graphs"
ODD_SENTENCES = (
    "",
    " Two\tlarge,white polyps -- (left/right)? ",
    "Ein großer Polyp, rechts; une lésion à gauche, naïve",
    "polyp\u200b\u00a0x\x00\u0130 一个息肉 [SEP] [UNK] 🙂 ½ $5",
    "x" * 101,
)
"""Sentences on which the runner's tokenizer is compared besides those of the data."""

Function = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the model.

    Attributes:
        path: File or folder.
        parity: Form → figures.
    """

    path: Path
    parity: dict[str, Parity]


class WholeSegmenter(Segmenter):
    """The same runner over the graph that is one piece."""

    def set_image(self, image: NDArray[Any]) -> None:
        """Keep an image, uint8 ``(height, width, 3)``; it is encoded anew for every sentence."""
        self.size = image.shape[:2]
        self.features = {"images": self.prepare_image(image)}

    def logits(self, text: str | None = None) -> NDArray[Any]:
        """Return the logits at the size the network sees."""
        side = self.manifest["preprocessing"]["image_size"]
        found = self.graphs[WHOLE](self.features | self.prepare_text(text))[LOGITS]
        return found[0, 0, :side, :side]


@dataclass(frozen=True)
class _Source:
    """A model on the way out."""

    checkpoint: Path
    predictor: Predictor
    graphs: list[Graph]

    @classmethod
    def load(cls, name: str) -> _Source:
        checkpoint = resolve_checkpoint(name)
        predictor = Predictor.from_pretrained(checkpoint, "cpu", "32")
        return cls(checkpoint, predictor, cut_graphs(predictor.model))

    def card(self) -> bytes:
        """Return the model card: that of the checkpoint, or of one without, written anew."""
        path = self.checkpoint / "README.md"
        if path.is_file():
            return path.read_bytes()
        return model_card(self.predictor.model, self.predictor.experiment, {}).encode()

    def manifest(self, graphs: Iterable[Graph], suffix: str) -> dict[str, Any]:
        return describe_export(self.predictor, self.checkpoint, graphs, suffix)

    def tokenize(self) -> Callable[[str], list[int]] | None:
        encoder = self.predictor.model.text_encoder
        return None if encoder is None else lambda text: encoder.tokenizer.tokenizer.encode(text).ids

    def tokenizer_file(self) -> dict[str, bytes]:
        encoder = self.predictor.model.text_encoder
        return {} if encoder is None else {TOKENIZER: encoder.tokenizer.tokenizer.to_str(pretty=True).encode("utf-8")}


def export_onnx(
    name: str,
    output: Path,
    data: Path | None = None,
    *,
    images: int = IMAGES,
    int8: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a folder with the graphs of a model as ONNX: in three pieces and in one.

    Args:
        name: Run folder, checkpoint folder or hub id.
        output: The folder to write.
        data: Data set to compare on; ``None`` draws images.
        images: Images to compare on.
        int8: Compute matrix products in 8-bit integers.
        overwrite: Replace an export that is there.

    Raises:
        ParityError: The masks differ from the model's; nothing was written.
        ConfigError: The method cannot be exported.
        StorageError: There is something at ``output``, or it cannot be written.
    """
    _require_free_folder(output, overwrite=overwrite)
    source = _Source.load(name)
    with open_cases(data, images) as cases:
        graphs = {graph.name: to_onnx(graph) for graph in source.graphs}
        manifest = source.manifest(source.graphs, ".onnx")
        graphs, parity = _checked_onnx(source, manifest, graphs, cases, source.tokenize(), int8=int8)
    files = {manifest["graphs"][name]["file"]: content for name, content in graphs.items()}
    _write_folder(output, manifest, parity, files | source.tokenizer_file())
    return Exported(output, parity)


def export_openvino(
    name: str, output: Path, data: Path | None = None, *, images: int = IMAGES, overwrite: bool = False
) -> Exported:
    """Write a folder with the graphs of a model for OpenVINO, to be computed in float32: in three pieces and in one.

    Args:
        name: Run folder, checkpoint folder or hub id.
        output: The folder to write.
        data: Data set to compare on; ``None`` draws images.
        images: Images to compare on.
        overwrite: Replace an export that is there.

    Raises:
        ParityError: The masks differ from the model's; nothing was written.
        ConfigError: The method cannot be exported.
        StorageError: There is something at ``output``, or it cannot be written.
    """
    import openvino  # noqa: F401  # before the long work

    _require_free_folder(output, overwrite=overwrite)
    source = _Source.load(name)
    with open_cases(data, images) as cases:
        files = to_openvino({graph.name: to_onnx(graph) for graph in source.graphs})
        manifest = source.manifest(source.graphs, ".xml") | {"precision": "float32", "compile_with": COMPILE_WITH}
        manifest["made_with"] |= versions(["openvino"])
        functions = {
            graph.name: openvino_graph(files[f"{graph.name}.xml"], files[f"{graph.name}.bin"])
            for graph in source.graphs
        }
        parity = measure_parity(source.predictor, _forms(manifest, functions, source.tokenize()), cases)
    require_parity(parity, LEAST_DICE)
    named = {f"{GRAPHS}/{name}": content for name, content in files.items()}
    _write_folder(output, manifest, parity, named | source.tokenizer_file())
    return Exported(output, parity)


def export_bundle(
    name: str,
    output: Path,
    data: Path | None = None,
    *,
    images: int = IMAGES,
    int8: bool = False,
    overwrite: bool = False,
) -> tuple[Exported, Bundle]:
    """Write a model as one file that runs without torch; see :mod:`tmca.export.bundle`.

    Args:
        name: Run folder, checkpoint folder or hub id.
        output: The file to write, ``NAME.tmca``.
        data: Data set to compare on; ``None`` draws images.
        images: Images to compare on.
        int8: Compute matrix products in 8-bit integers.
        overwrite: Replace a file that is there.

    Raises:
        ParityError: The masks differ from the model's; nothing was written.
        ConfigError: The method cannot be exported, or its tokenizer is none that the runner knows.
        StorageError: There is a file already, or it cannot be written.
    """
    if output.is_dir():
        raise StorageError(f"{output} is a folder, expected a file", hint=f"name a file: -o {output / 'NAME.tmca'}")
    if output.exists() and not overwrite:
        raise StorageError(f"{output} exists already", hint="name another file, or replace it: --overwrite")
    require_writable(output)
    source = _Source.load(name)
    chosen = [graph for graph in source.graphs if graph.name != WHOLE]
    with open_cases(data, images) as cases:
        tokenize = _runner_tokenizer(source, cases.manifest.sentences)
        manifest = source.manifest(chosen, ".onnx")
        graphs = {graph.name: to_onnx(graph) for graph in chosen}
        graphs, parity = _checked_onnx(source, manifest, graphs, cases, tokenize, int8=int8)
    files = {manifest["graphs"][name]["file"]: content for name, content in graphs.items()}
    files |= source.tokenizer_file() | _papers(source)
    manifest["parity"] = {form: figures.as_dict() for form, figures in parity.items()}
    files["sbom.cdx.json"] = bill_of_materials(manifest, files).encode()
    with replace_file(output) as temporary:
        temporary.write_bytes(pack(manifest, files))
        bundle = open_bundle(temporary)
    return Exported(output, parity), Bundle(output, bundle.sha256, bundle.manifest, bundle.files)


def _papers(source: _Source) -> dict[str, bytes]:
    """Return what a bundle holds besides the model: card, licences, runner."""
    licences = describe_licences(source.predictor.experiment, versions((*MAKERS, *RUNNERS)))
    return {
        "README.md": source.card(),
        "licences/README.md": licences.encode(),
        "licences/Apache-2.0.txt": tmca_licence().encode(),
        "tmca_run.py": Path(tmca_run.__file__).read_bytes(),
    }


def _checked_onnx(
    source: _Source,
    manifest: dict[str, Any],
    graphs: dict[str, bytes],
    cases: Cases,
    tokenize: Callable[[str], list[int]] | None,
    *,
    int8: bool,
) -> tuple[dict[str, bytes], dict[str, Parity]]:
    """Return the graphs to write, in the precision that was asked for, and how far they are from the model."""
    manifest["precision"] = "int8" if int8 else "float32"
    chosen = {name: quantise(content) for name, content in graphs.items()} if int8 else graphs
    if int8 and not any(is_quantised(content) for content in chosen.values()):
        raise ConfigError("Nothing of this model can be computed in int8: it only convolves", hint="leave --int8 out")
    functions: dict[str, Function] = {name: onnx_graph(content) for name, content in chosen.items()}
    parity = measure_parity(source.predictor, _forms(manifest, functions, tokenize), cases)
    require_parity(parity, LEAST_DICE_INT8 if int8 else LEAST_DICE)
    return chosen, parity


def _forms(
    manifest: dict[str, Any], functions: dict[str, Function], tokenize: Callable[[str], list[int]] | None
) -> dict[str, Segmenter]:
    forms = {"in pieces": Segmenter(manifest, functions, tokenize)}
    return forms | ({"in one": WholeSegmenter(manifest, functions, tokenize)} if WHOLE in functions else {})


def _runner_tokenizer(source: _Source, sentences: Iterable[str]) -> WordPieces | None:
    """Return the runner's own tokenizer after comparing it with the model's.

    Raises:
        ConfigError: It gives other tokens, or does not know this kind.
    """
    tokenize = source.tokenize()
    if tokenize is None:
        return None
    try:
        own = WordPieces(source.tokenizer_file()[TOKENIZER])
        differs = [text for text in (*sentences, *ODD_SENTENCES) if own(text) != tokenize(text)]
    except (LookupError, TypeError):  # another kind of tokenizer.json
        differs = [""]
    if differs:
        raise ConfigError(
            "The runner of a bundle reads the WordPiece tokenizers of BERT, and this model has another one",
            hint="use `tmca export onnx`, and tokenize with the package tokenizers",
        )
    return own


def _require_free_folder(output: Path, *, overwrite: bool) -> None:
    """Refuse to write over anything but an earlier export, and over that only when asked.

    Raises:
        StorageError: Something is there, or nothing can be written there.
    """
    require_writable(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        ours = json.loads((output / MANIFEST).read_text("utf-8"))["format"] == FOLDER_FORMAT
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if not ours:
        raise StorageError(f"{output} exists and is no export", hint="name another folder")
    strange = sorted(each.name for each in output.iterdir() if each.name not in {MANIFEST, TOKENIZER, GRAPHS})
    if strange:
        hint = "name another folder, or move the file away: an export replaces the whole folder"
        raise StorageError(f"{output} holds {strange[0]}, which is not of an export", hint=hint)
    if not overwrite:
        raise StorageError(f"{output} holds an export already", hint="name another folder, or replace it: --overwrite")


def _write_folder(
    output: Path, manifest: dict[str, Any], parity: Mapping[str, Parity], files: Mapping[str, bytes]
) -> None:
    described = {"format": FOLDER_FORMAT, "format_version": 1, **manifest}
    with replace_folder(output) as place:
        for name, content in files.items():
            write_bytes(place / name, content)
        write_json(
            place / MANIFEST, described | {"parity": {form: figures.as_dict() for form, figures in parity.items()}}
        )
