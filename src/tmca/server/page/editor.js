// Brush and eraser on a mask, with undo and redo; exact to the pixel, and nothing is sent before the button is pressed.
window.tmcaEditor = (() => {
  const COLOUR = "rgb(255, 200, 0)";
  const MOST_STEPS = 20;
  let tool = "brush";
  let undone = [];
  let done = [];
  let last = null;
  let spot = null;
  let shown = "";

  const root = () => document.getElementById("editor");
  const canvas = () => root()?.querySelector("canvas");
  const size = () => Number(root().querySelector("input").value);
  const pixels = () => canvas().getContext("2d", { willReadFrequently: true });
  const scale = () => canvas().width / canvas().clientWidth;

  const copy = () => pixels().getImageData(0, 0, canvas().width, canvas().height);

  const update = () => {
    for (const button of root().querySelectorAll("button[data-tool]")) {
      const name = button.dataset.tool;
      if (name === "undo") button.disabled = !done.length;
      else if (name === "redo") button.disabled = !undone.length;
      else button.setAttribute("aria-pressed", String(name === tool));
    }
  };

  const begin = () => {
    done.push(copy());
    if (done.length > MOST_STEPS) done.shift();
    undone = [];
    update();
  };

  const step = (from, to) => {
    if (!from.length) return;
    to.push(copy());
    pixels().putImageData(from.pop(), 0, 0);
    update();
  };

  const stroke = (from, to) => {
    const pen = pixels();
    pen.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
    pen.strokeStyle = COLOUR;
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = size() * scale();
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x + 0.01, to.y);
    pen.stroke();
  };

  const place = (event) => {
    const box = canvas().getBoundingClientRect();
    return { x: (event.clientX - box.left) * scale(), y: (event.clientY - box.top) * scale() };
  };

  const showCursor = (point) => {
    const cursor = root().querySelector(".cursor");
    spot = point;
    Object.assign(cursor.style, {
      display: point ? "block" : "none",
      width: `${size()}px`,
      height: `${size()}px`,
      left: point ? `${canvas().offsetLeft + point.x / scale()}px` : "0",
      top: point ? `${canvas().offsetTop + point.y / scale()}px` : "0",
    });
  };

  const onCanvas = (event) => event.target === canvas();

  document.addEventListener("pointerdown", (event) => {
    if (!onCanvas(event) || event.button !== 0 || canvas().width < 2) return;
    canvas().setPointerCapture(event.pointerId);
    begin();
    last = place(event);
    stroke(last, last);
  });
  document.addEventListener("pointermove", (event) => {
    if (!onCanvas(event)) return;
    const point = place(event);
    showCursor(point);
    if (!last) return;
    stroke(last, point);
    last = point;
  });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => (last = null));
  document.addEventListener("pointerout", (event) => onCanvas(event) && showCursor(null));
  document.addEventListener("click", (event) => {
    const name = event.target.closest?.("#editor button[data-tool]")?.dataset.tool;
    if (name === "undo") step(done, undone);
    else if (name === "redo") step(undone, done);
    else if (name) {
      tool = name;
      update();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (!canvas()?.offsetParent || event.target.matches?.("textarea, input:not([type=range])")) return;
    const key = event.key.toLowerCase();
    if (event.ctrlKey && (key === "z" || key === "y")) {
      event.preventDefault();
      key === "y" || event.shiftKey ? step(undone, done) : step(done, undone);
    } else if (onCanvas(event)) {
      const moves = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] };
      const middle = { x: canvas().width / 2, y: canvas().height / 2 };
      if (moves[key]) {
        event.preventDefault();
        const from = spot ?? middle;
        const far = Math.max(1, (size() * scale()) / 4);
        const within = (value, most) => Math.min(most, Math.max(0, value));
        showCursor({
          x: within(from.x + far * moves[key][0], canvas().width),
          y: within(from.y + far * moves[key][1], canvas().height),
        });
      } else if (key === " ") {
        event.preventDefault();
        begin();
        showCursor(spot ?? middle);
        stroke(spot, spot);
      }
    }
  });

  const load = (source) =>
    new Promise((resolve) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.src = source;
    });

  return {
    // What was drawn on a mask stays until that mask changes, or is asked for anew.
    async show(text, anew = false) {
      if (!anew && text === shown && done.length) return;
      shown = text;
      done = [];
      undone = [];
      const stage = root().querySelector(".stage");
      stage.classList.toggle("ready", Boolean(text));
      if (text) {
        const { image, mask } = JSON.parse(text);
        const [picture, layer] = await Promise.all([load(image), load(mask)]);
        stage.querySelector("img").src = image;
        canvas().width = picture.naturalWidth;
        canvas().height = picture.naturalHeight;
        pixels().drawImage(layer, 0, 0);
      }
      update();
    },
    // The drawing and which mask it was made on; nothing if strokes are asked for and there are none.
    drawing(strokesOnly) {
      if (!shown || (strokesOnly && !done.length)) return "";
      return JSON.stringify({ of: JSON.parse(shown).of, drawn: canvas().toDataURL("image/png") });
    },
  };
})();
