"""The page: its components, and which handler answers which of them."""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import json
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gradio as gr

from tmca.errors import ConfigError, DataError, TMCAError
from tmca.imaging.dicom.results import INTENDED_USE
from tmca.imaging.overlay import FILL
from tmca.outputs import NIFTI, PNG, RLE, SEGMENTATION
from tmca.prediction import PredictionOptions
from tmca.server.messages import failure_of
from tmca.server.page import handlers, pictures, words
from tmca.server.page.handlers import Asks, Desk, Opened, Past, Result
from tmca.server.problems import RemoteError
from tmca.server.settings import ServerSettings

LUNG_EXAMPLES = (
    "Bilateral pulmonary infection, two infected areas, lower left lung and lower right lung.",
    "Unilateral pulmonary infection, one infected area, upper right lung.",
)
POLYP_EXAMPLES = (
    "one medium pink round polyp, located in center of the image",
    "two small white round polyp, located in top left, bottom of the image",
)
PHANTOM_EXAMPLES = ("one large bright round lesion, located in top left of the image", "no lesion in the image")
DOWNLOAD_LABELS = {PNG: "PNG mask", NIFTI: "NIfTI", SEGMENTATION: "DICOM SEG", RLE: "JSON"}
STATE_SECONDS = 3600
EMPTY_VIEW = '<p class="empty">The result appears here.</p>'

SAVE_FILE = """(text) => {
  if (!text) return;
  const { name, content } = JSON.parse(text);
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
TO_EDITOR = "(text) => window.tmcaEditor.show(text)"
TO_EDITOR_ANEW = "(text) => window.tmcaEditor.show(text, true)"
FROM_EDITOR = "(result, past, choice) => [result, past, choice, window.tmcaEditor.drawing(false)]"
STROKES = "(result, past, choice) => [result, past, choice, window.tmcaEditor.drawing(true)]"
TO_ANSWER = "() => { if (innerWidth <= 900) document.querySelector('#answer').scrollIntoView(); }"
SET_OPACITY = "(value) => { document.documentElement.style.setProperty('--mask-opacity', value); }"

Updates = dict[Any, Any]
Handler = Callable[..., Awaitable[Updates | None]]
"""What changes; ``None`` from an answer that came too late."""


def examples_for(models: dict[str, str]) -> tuple[str, ...]:
    """Return sentences of the kind that the served models were trained with, as far as their names tell."""
    names = " ".join((*models, *(Path(source).name for source in models.values()))).lower()
    known = (
        (LUNG_EXAMPLES, ("qata", "mosmed", "lung", "covid", "chest")),
        (POLYP_EXAMPLES, ("polyp", "kvasir", "bkai", "clinic", "colon")),
        (PHANTOM_EXAMPLES, ("phantom", "demo")),
    )
    chosen = [example for examples, signs in known if any(sign in names for sign in signs) for example in examples]
    return tuple(chosen) or (LUNG_EXAMPLES[0], POLYP_EXAMPLES[0], PHANTOM_EXAMPLES[0])


def build_page(engine: Asks, settings: ServerSettings) -> gr.Blocks:
    """Return the page of a server."""
    page: gr.Blocks
    with gr.Blocks(title="tmca", analytics_enabled=False, fill_width=True) as page:
        _Page(engine, settings).wire()
    page.state_session_capacity = 200
    return page


class _Page:
    """The components, in the order in which they are read."""

    def __init__(self, engine: Asks, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        models = list(settings.worker.models)
        self.desk = gr.State(Desk())
        self.opened = gr.State(None, time_to_live=STATE_SECONDS)
        self.result = gr.State(None, time_to_live=STATE_SECONDS)
        self.past = gr.State((), time_to_live=STATE_SECONDS)
        gr.HTML("<h1>Segment by sentence</h1>", elem_id="title", padding=False)
        with gr.Row(elem_id="columns"):
            with gr.Column(min_width=320, elem_id="controls"):
                gr.HTML("<h2>Image and sentence</h2>", padding=False)
                self.image = gr.File(
                    label="Image: PNG, JPEG, TIFF, DICOM or NIfTI", height=116, elem_id="image-input", type="filepath"
                )
                self.facts = gr.HTML("", elem_id="image-facts", padding=False)
                self.slice = gr.Slider(0, 1, 0, step=1, label="Slice", visible=False, elem_id="slice")
                self.prompt = gr.Textbox(
                    label="Sentence",
                    info="One a line compares several. None: the image alone.",
                    placeholder=examples_for(settings.worker.models)[0],
                    lines=3,
                    max_lines=10,
                    elem_id="prompt",
                )
                self.tokens = gr.HTML("", elem_id="tokens", padding=False)
                self.segment = gr.Button("Segment", variant="primary", size="lg", elem_id="segment")
                self.status = gr.HTML("", elem_id="status", padding=False)
                self.model = gr.Dropdown(
                    models, value=models[0], label="Model", visible=len(models) > 1, elem_id="model"
                )
                with gr.Accordion("Example sentences", open=True, elem_id="examples"):
                    self.examples = [
                        gr.Button(text, size="sm", variant="secondary", elem_classes="example")
                        for text in examples_for(settings.worker.models)
                    ]
            with gr.Column(min_width=320, elem_id="outcome"):
                gr.HTML("<h2>Result</h2>", padding=False)
                self.answer = gr.HTML(
                    '<p class="waiting">Choose an image, write a sentence, press Segment.</p>',
                    elem_id="answer",
                    padding=False,
                )
                self.conflicts = gr.HTML("", elem_id="conflicts", padding=False)
                self.effect = gr.HTML("", elem_id="effect", padding=False)
                with gr.Tabs(elem_id="views") as self.views:
                    with gr.Tab("Mask", id="mask"):
                        self.overlay = gr.HTML(EMPTY_VIEW, elem_id="overlay", padding=False)
                        with gr.Row():
                            self.threshold = gr.Slider(
                                0.05, 0.95, 0.5, step=0.01, label="Threshold", elem_id="threshold", buttons=[]
                            )
                            self.opacity = gr.Slider(
                                0, 1, FILL, step=0.05, label="Mask opacity", elem_id="opacity", buttons=[]
                            )
                            self.min_region = gr.Slider(
                                0, 1000, 0, step=10, label="Smallest region, px", elem_id="min-region", buttons=[]
                            )
                    with gr.Tab("Probability", id="probability"):
                        self.probability = gr.HTML(EMPTY_VIEW, elem_id="probability", padding=False)
                    with gr.Tab("Attention", id="attention"):
                        self.attention = gr.HTML(EMPTY_VIEW, elem_id="attention", padding=False)
                    with gr.Tab("Correct", id="correct") as self.correct_tab:
                        self.editor = gr.HTML(EDITOR, elem_id="editor", padding=False)
                        self.drawing = gr.Textbox(visible="hidden", elem_id="drawing", label="Drawing")
                        with gr.Row():
                            self.apply = gr.Button("Use corrected mask", variant="primary", elem_id="apply-correction")
                            self.discard = gr.Button("Back to the model’s mask", elem_id="discard-correction")
                self.choice = gr.Radio([], label="Sentence to correct and to save", visible=False, elem_id="choice")
                with gr.Row(elem_id="downloads", visible=False) as self.downloads:
                    self.savers = {
                        kind: gr.Button(f"Save {label}", size="sm", elem_id=f"download-{kind}")
                        for kind, label in DOWNLOAD_LABELS.items()
                    }
                self.file = gr.Textbox(visible="hidden", elem_id="file-to-save", label="File")
            with gr.Column(min_width=320, elem_id="more"):
                with gr.Accordion("Session history", open=False, elem_id="history-box"):
                    self.history = gr.Radio(
                        [], label="Asked in this session; picking one shows it again", elem_id="history"
                    )
                    self.no_history = gr.HTML("<p>Nothing has been asked yet.</p>", padding=False)
                with gr.Accordion("Keyboard", open=False, elem_id="keyboard"):
                    gr.HTML(KEYBOARD, padding=False)
        gr.HTML(
            f'<footer role="contentinfo">{INTENDED_USE}. tmca {html.escape(version("tmca"))}</footer>',
            elem_id="footer",
            padding=False,
        )

    # --- wiring ---

    def wire(self) -> None:
        """Say which handler answers which component."""
        asking = [self.desk, self.opened, self.past, self.prompt, self.model, self.threshold, self.min_region]
        shown = [
            self.opened, self.result, self.past, self.status, self.facts, self.slice, self.answer, self.conflicts,
            self.effect, self.overlay, self.probability, self.attention, self.choice, self.downloads, self.history,
            self.no_history, self.views, *self.savers.values(),
        ]  # fmt: skip
        drawing = {"show_progress": "minimal", "show_progress_on": [self.overlay]}
        self._on(self.image.upload, self.open, [self.desk, self.image], shown, **drawing)
        self._on(self.image.clear, self.clear, [self.desk], shown, show_progress="hidden")
        last = {"trigger_mode": "always_last"}
        self._on(self.slice.change, self.turn, [self.desk, self.opened, self.slice], shown, **drawing, **last)
        asked = self._on(self.segment.click, self.ask, asking, shown, **drawing, **last)
        self._in_browser(asked.success, None, TO_ANSWER)
        for source in (self.prompt.change, self.model.change):
            self._on(
                source, self.count, [self.prompt, self.model], [self.tokens, self.status],
                show_progress="hidden", trigger_mode="always_last",
            )  # fmt: skip
        for button in self.examples:
            button.click(
                functools.partial(str, button.value), None, self.prompt, show_progress="hidden",
                api_visibility="private", queue=False,
            )  # fmt: skip
        redrawing = [self.result, self.threshold, self.min_region, self.choice]
        for slider in (self.threshold, self.min_region):
            self._on(slider.change, self.redraw, redrawing, shown, show_progress="hidden", trigger_mode="always_last")
        self._in_browser(self.opacity.change, self.opacity, SET_OPACITY)
        correcting = [self.result, self.choice]
        into_editor = [self.drawing, self.status]
        for event, handler, outputs, script in (
            (self.correct_tab.select, self.edit, into_editor, TO_EDITOR),
            (self.choice.input, self.choose, [*into_editor, *self.savers.values()], TO_EDITOR_ANEW),
            (self.discard.click, self.restore, [*shown, self.drawing], TO_EDITOR_ANEW),
        ):
            edited = self._on(event, handler, correcting, outputs, show_progress="hidden")
            self._in_browser(edited.success, self.drawing, script)
        drawn = [self.result, self.past, self.choice, self.drawing]
        self._on(self.apply.click, self.correct, drawn, shown, js=FROM_EDITOR, **drawing)
        for kind, button in self.savers.items():
            saved = self._on(
                button.click, functools.partial(self.save, kind), drawn, [*shown, self.file],
                js=STROKES, show_progress="minimal", show_progress_on=[self.downloads],
            )  # fmt: skip
            self._in_browser(saved.success, self.file, SAVE_FILE)
        self._on(
            self.history.input, self.recall, [self.desk, self.past, self.history],
            [*shown, self.prompt, self.model, self.threshold, self.min_region, self.image], **drawing,
        )  # fmt: skip

    def _on(self, event: Any, handler: Handler, inputs: list[Any], outputs: list[Any], **options: Any) -> Any:  # noqa: ANN401
        """Answer an event; what went wrong is told in words, and nothing else changes.

        Gradio's own queue is left out: the engine has one, and of two events in a row Gradio's can lose the second.
        """

        async def guarded(*values: Any) -> Any:  # noqa: ANN401
            try:
                updates = await handler(*values)
                return gr.skip() if updates is None else {self.status: "", **updates}
            except TMCAError as error:
                return {self.status: _problem(words.problem(error))}
            except Exception as error:  # a fault of ours
                return {self.status: _problem(words.problem(RemoteError.of(failure_of(0, error))))}

        return event(guarded, inputs, outputs, api_visibility="private", queue=False, **options)

    def _in_browser(self, event: Any, component: Any, script: str) -> None:  # noqa: ANN401
        """Answer an event by a script of the page; the server hears nothing of it."""
        event(None, component, None, js=script, show_progress="hidden", api_visibility="private", queue=False)

    # --- image ---

    async def open(self, desk: Desk, path: str | None) -> Updates | None:
        """Show an image that was uploaded; one that is none leaves no other in its place."""
        if path is None:
            return await self.clear(desk)
        turn = desk.clear()
        try:
            opened = await handlers.open_image(self.engine, self.settings, Path(path))
        except TMCAError as error:
            return self._nothing() | {self.status: _problem(words.problem(error))} if desk.turn == turn else None
        return self._opened(opened) if desk.turn == turn else None

    async def turn(self, desk: Desk, opened: Opened | None, number: float) -> Updates | None:
        """Show another slice."""
        if opened is None or opened.frame in (None, number):
            return {}
        turn = desk.clear()
        try:
            turned = await handlers.open_image(self.engine, self.settings, opened.path, int(number))
        except TMCAError as error:
            return {self.slice: self._slider(opened), self.status: _problem(words.problem(error))}
        return self._opened(turned) if desk.turn == turn else None

    async def clear(self, desk: Desk) -> Updates:
        """Forget the image; the history stays."""
        desk.clear()
        return self._nothing()

    def _nothing(self) -> Updates:
        return self._without_result() | {
            self.opened: None,
            self.facts: "",
            self.slice: gr.Slider(visible=False),
            self.answer: '<p class="waiting">Choose an image, write a sentence, press Segment.</p>',
            self.overlay: EMPTY_VIEW,
        }

    def _opened(self, opened: Opened) -> Updates:
        looked = opened.looked
        facts = words.image_facts(looked.kind, looked.modality, looked.size, looked.frames)
        alt = f"The image {opened.title}, not segmented yet"
        figure = pictures.mask_figure(looked.pixels, None, opened.title, alt, pictures.LONGEST_SIDE)
        return self._without_result() | {
            self.opened: opened,
            self.facts: f'<p data-image="{opened.key}">{facts}</p>',
            self.slice: self._slider(opened),
            self.answer: '<p class="waiting">Not segmented yet.</p>',
            self.overlay: pictures.figures([figure]),
        }

    def _slider(self, opened: Opened) -> Any:  # noqa: ANN401
        if opened.frame is None:
            return gr.Slider(visible=False)
        return gr.Slider(maximum=opened.looked.frames - 1, value=opened.frame, visible=True)

    def _without_result(self) -> Updates:
        return {
            self.result: None,
            self.conflicts: "",
            self.effect: "",
            self.probability: EMPTY_VIEW,
            self.attention: EMPTY_VIEW,
            self.choice: gr.Radio([], visible=False),
            self.downloads: gr.Row(visible=False),
            self.views: gr.Tabs(selected="mask"),
        }

    # --- sentence ---

    async def count(self, prompt: str, model: str) -> Updates:
        """Say how long the sentences are for the model."""
        texts = handlers.sentences(prompt, self.settings.max_prompts)
        counts = await handlers.count_tokens(self.engine, model, texts)
        too_long = any(truncated for _, truncated, _ in counts)
        style = ' class="too-long"' * too_long
        return {self.tokens: f"<p{style}>{words.token_count(counts)}</p>" if counts else ""}

    async def ask(
        self,
        desk: Desk,
        opened: Opened | None,
        past: tuple[Past, ...],
        prompt: str,
        model: str,
        threshold: float,
        least: float,
    ) -> Updates | None:
        """Segment; an answer is dropped if another image was opened meanwhile."""
        turn = desk.turn
        texts = handlers.sentences(prompt, self.settings.max_prompts)
        options = PredictionOptions(threshold, int(least))
        try:
            result = await handlers.segment(self.engine, self.settings, opened, model, texts, options)
        except TMCAError:
            if desk.turn != turn:
                return None
            raise
        return self._shown(result) | self._remembered(past, result) if desk.turn == turn else None

    async def redraw(self, result: Result | None, threshold: float, least: float, choice: int | None) -> Updates:
        """Make the masks at another threshold."""
        if result is None:
            return {}
        options = PredictionOptions(threshold, int(least))
        if options == result.options:
            return {}
        said = "The corrected mask was replaced by the model’s at the new threshold." if result.corrected else ""
        return self._shown(handlers.redraw(result, options), choice) | {self.status: _problem(said) if said else ""}

    # --- result ---

    def _shown(self, result: Result, choice: int | None = None) -> Updates:
        many = len(result.predictions) > 1
        number = (choice or 0) if many else 0
        choices = [(f"{index + 1}: {words.sentence(text)}", index) for index, text in enumerate(result.texts)]
        return self._drawn(result, many=many) | {
            self.result: result,
            self.choice: gr.Radio(choices, value=number, visible=many),
            self.downloads: gr.Row(visible=True),
            self.views: gr.Tabs(selected="mask"),
            **self._saveable(result, number),
        }

    def _drawn(self, result: Result, *, many: bool) -> Updates:
        side = pictures.LONGEST_PANEL if many else pictures.LONGEST_SIDE
        masks, maps, attention = [], [], []
        for number, prediction in enumerate(result.predictions):
            answer = words.headline(prediction)
            caption = f"{words.sentence(prediction.text)}: {answer}" if many else result.image.title
            by_hand = " Corrected by hand." * (number in result.corrected)
            alt = f"{result.image.title} with {words.sentence(prediction.text)}: {answer}{by_hand}"
            masks.append(pictures.mask_figure(result.pixels, prediction.mask, caption + by_hand, alt, side))
            alt = f"Probability of each pixel, {words.sentence(prediction.text)}"
            maps.append(
                pictures.heat_figure(result.pixels, prediction.probability, words.sentence(prediction.text), alt, side)
            )
            attended = result.attention[number]
            if attended is not None:
                alt = f"Where in the image {words.sentence(prediction.text)} points"
                values = attended / max(float(attended.max()), 1e-6)
                attention.append(
                    pictures.heat_figure(result.pixels, values, words.sentence(prediction.text), alt, side)
                )
        no_attention = '<p class="empty">There is no attention to show: {}.</p>'.format(
            "no sentence was given" if not any(result.texts) else "this model does not have it"
        )
        return {
            self.answer: self._headline(result),
            self.conflicts: self._conflicts(result),
            self.effect: self._effects(result),
            self.overlay: pictures.figures(masks),
            self.probability: pictures.figures(maps) + pictures.legend("probability 0", "1"),
            self.attention: (
                pictures.figures(attention) + pictures.legend("little attention", "most") if attention else no_attention
            ),
        }

    def _headline(self, result: Result) -> str:
        found = any(prediction.regions for prediction in result.predictions)
        style = "found" if found else "nothing"
        said = html.escape(words.summary(result.predictions))
        answer = f'<p class="{style}" data-image="{result.image.key}">{said}</p>'
        many = len(result.predictions) > 1  # else the image's name stands below its picture
        return answer + f'<p class="of">{html.escape(result.image.title)}</p>' * many

    def _conflicts(self, result: Result) -> str:
        many = len(result.predictions) > 1
        lines = [
            (f"{words.sentence(prediction.text)}: " if many else "") + doubt
            for prediction in result.predictions
            for doubt in words.doubts(prediction)
        ]
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        return f'<div class="conflicts"><strong>Check the sentence and the mask</strong><ul>{items}</ul></div>' * bool(
            lines
        )

    def _effects(self, result: Result) -> str:
        many = len(result.predictions) > 1
        lines = []
        for number, prediction in enumerate(result.predictions):
            by_hand = number in result.corrected
            said = "This mask was corrected by hand." if by_hand else words.effect(prediction, result.asked.threshold)
            line = (f"{words.sentence(prediction.text)}: " if many else "") + f"{said} {words.reliability(prediction)}"
            lines.append(html.escape(line.strip()))
        return f"<p>{lines[0]}</p>" if not many else f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"

    def _saveable(self, result: Result, number: int) -> Updates:
        kinds = handlers.download_kinds(result, number)
        return {button: gr.Button(visible=kind in kinds) for kind, button in self.savers.items()}

    # --- correction ---

    async def edit(self, result: Result | None, choice: int | None) -> Updates:
        """Put image and mask into the editor."""
        return {self.drawing: "" if result is None else handlers.drawing_of(result, choice or 0)}

    async def choose(self, result: Result | None, choice: int | None) -> Updates:
        """Turn to the mask of another sentence."""
        if result is None:
            return {}
        return await self.edit(result, choice) | self._saveable(result, choice or 0)

    async def correct(self, result: Result | None, past: tuple[Past, ...], choice: int | None, drawing: str) -> Updates:
        """Take what was drawn as the mask."""
        if result is None:
            raise ConfigError("There is no mask yet", hint="press Segment first")
        changed = handlers.correct(result, choice or 0, drawing)
        return self._shown(changed, choice) | self._remembered(past, changed)

    async def restore(self, result: Result | None, choice: int | None) -> Updates:
        """Take the model's mask again."""
        if result is None:
            return {}
        restored = handlers.restore(result, choice or 0)
        shown = self._shown(restored, choice)
        del shown[self.views]
        return shown | {self.drawing: handlers.drawing_of(restored, choice or 0)}

    # --- files and history ---

    async def save(
        self, kind: str, result: Result | None, past: tuple[Past, ...], choice: int | None, drawing: str
    ) -> Updates:
        """Hand a file to the browser, with what was drawn on the mask."""
        number, updates = choice or 0, Updates()
        if result is not None and handlers.is_drawn_on(result, number, drawing):
            with contextlib.suppress(DataError):  # strokes that change nothing
                result = handlers.correct(result, number, drawing)
                updates = self._shown(result, choice) | self._remembered(past, result)
        made = await handlers.download(result, number, kind)
        content = base64.b64encode(made.content).decode("ascii")
        return updates | {self.file: json.dumps({"name": made.name, "content": content})}

    async def recall(self, desk: Desk, past: tuple[Past, ...], number: int) -> Updates | None:
        """Show again what was asked earlier."""
        if not 0 <= number < len(past):
            return {}
        chosen, turn = past[number], desk.clear()
        opened = await handlers.open_image(self.engine, self.settings, chosen.path, chosen.frame)
        result = await handlers.segment(self.engine, self.settings, opened, chosen.model, chosen.texts, chosen.options)
        if desk.turn != turn:
            return None
        result = handlers.with_corrections(result, chosen)
        return (
            self._opened(opened)
            | self._shown(result)
            | {
                self.image: str(chosen.path),
                self.prompt: "\n".join(text for text in chosen.texts if text),
                self.model: chosen.model,
                self.threshold: chosen.options.threshold,
                self.min_region: chosen.options.min_region,
            }
        )

    def _remembered(self, past: tuple[Past, ...], result: Result) -> Updates:
        past = handlers.remembered(past, result, words.summary(result.predictions))
        choices = [
            (
                f"{each.name}: {'; '.join(map(words.sentence, each.texts))}: {each.answer}"
                + " Corrected by hand." * bool(each.corrections),
                index,
            )
            for index, each in enumerate(past)
        ]
        return {self.past: past, self.history: gr.Radio(choices, value=None), self.no_history: ""}


def _problem(text: str) -> str:
    return f'<p class="problem">{html.escape(text)}</p>'


EDITOR = """<div class="tools" role="toolbar" aria-label="Correct the mask">
<button type="button" data-tool="brush" aria-pressed="true">Brush</button>
<button type="button" data-tool="eraser" aria-pressed="false">Eraser</button>
<label>Size <input type="range" min="1" max="100" value="24" data-tool="size"></label>
<button type="button" data-tool="undo" disabled>Undo</button>
<button type="button" data-tool="redo" disabled>Redo</button>
</div>
<div class="stage"><img alt=""><canvas width="1" height="1" tabindex="0" role="application"
aria-label="Mask on the image. Arrow keys move the brush, space draws."></canvas><span class="cursor"></span></div>"""
KEYBOARD = """<ul>
<li><kbd>Ctrl</kbd> + <kbd>Enter</kbd>: segment</li>
<li><kbd>Alt</kbd> + <kbd>Shift</kbd> + <kbd>S</kbd>: to the sentence</li>
<li><kbd>Alt</kbd> + <kbd>Shift</kbd> + <kbd>M</kbd>, <kbd>P</kbd>, <kbd>A</kbd>, <kbd>C</kbd>: mask, probability,
attention, correct</li>
<li><kbd>Ctrl</kbd> + <kbd>Z</kbd>: undo, <kbd>Ctrl</kbd> + <kbd>Y</kbd>: redo, while correcting;
arrow keys and space draw</li>
</ul>"""
