// Keyboard, and what screen readers need that Gradio does not say.
(() => {
  const views = { KeyM: "Mask", KeyP: "Probability", KeyA: "Attention", KeyC: "Correct" };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey && event.key === "Enter") {
      event.preventDefault();
      document.querySelector("#segment")?.click();
    } else if (event.altKey && event.shiftKey && event.code === "KeyS") {
      event.preventDefault();
      document.querySelector("#prompt textarea")?.focus();
    } else if (event.altKey && event.shiftKey && views[event.code]) {
      event.preventDefault();
      for (const tab of document.querySelectorAll("#views button[role=tab]"))
        if (tab.textContent.trim() === views[event.code]) tab.click();
    }
  });

  // The server drops an answer about an image that is no longer open; one that was on its way then is hidden here.
  const hideLate = () => {
    const about = document.querySelector("#answer [data-image]")?.dataset.image;
    const open = document.querySelector("#image-facts [data-image]")?.dataset.image;
    document.getElementById("outcome")?.classList.toggle("late", Boolean(about) && about !== open);
  };

  const live = { answer: "polite", conflicts: "polite", status: "assertive", tokens: "polite", "image-facts": "polite" };
  const setUp = () => {
    hideLate();
    for (const [id, manner] of Object.entries(live)) {
      const element = document.getElementById(id);
      if (element && element.getAttribute("aria-live") !== manner) {
        element.setAttribute("aria-live", manner);
        element.setAttribute("aria-atomic", "true");
      }
    }
    for (const button of document.querySelectorAll("button.label-wrap")) {
      const open = String(button.classList.contains("open"));
      if (button.getAttribute("aria-expanded") !== open) button.setAttribute("aria-expanded", open);
    }
  };
  new MutationObserver(setUp).observe(document.documentElement, {
    childList: true,
    subtree: true,
    attributeFilter: ["class"],
  });
})();
