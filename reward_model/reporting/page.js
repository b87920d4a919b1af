"use strict";
// Draws the charts with BokehJS, in the colors of the page, and lets the buttons of a legend show and hide its lines.
(() => {
  const dark = JSON.parse(document.getElementById("dark-colors").textContent);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const mouse = matchMedia("(pointer: fine)");
  const figures = new Map(); // name of a chart → Bokeh's figure

  function show(button) {
    const figure = figures.get(button.dataset.chart);
    if (!figure) return;
    const visible = button.getAttribute("aria-pressed") === "true";
    const parts = [...figure.renderers, ...figure.center, ...figure.left, ...figure.right, ...figure.above, ...figure.below];
    for (const part of parts) if (part.name === button.dataset.series) part.visible = visible;
  }

  // the canvas is no stop of the tab key: the table under a chart has its numbers
  function leave_out_of_tabs(node) {
    for (const each of node.querySelectorAll("*")) {
      if (each.tabIndex >= 0) each.tabIndex = -1;
      if (each.shadowRoot) leave_out_of_tabs(each.shadowRoot);
    }
  }

  async function draw(place) {
    const text = document.getElementById(`data-${place.id}`).textContent;
    const colored = scheme.matches ? text.replace(/#[0-9a-f]{6}/g, (color) => dark[color] ?? color) : text;
    figures.delete(place.id);
    place.replaceChildren();
    try {
      await Bokeh.embed.embed_item(JSON.parse(colored), place.id);
      const figure = Bokeh.documents[Bokeh.documents.length - 1].roots()[0];
      const zoom = figure.toolbar.tools.find((tool) => tool.type === "BoxZoomTool");
      if (mouse.matches && zoom) zoom.active = true;
      figure.on_event("doubletap", () => figure.reset.emit());
      figures.set(place.id, figure);
      leave_out_of_tabs(place);
      document.querySelectorAll(`.legend button[data-chart="${place.id}"]`).forEach(show);
    } catch (error) {
      console.error(error);
      place.innerHTML = "<p>This browser could not draw the chart. Its numbers are in the table below.</p>";
    }
  }

  async function draw_all() {
    document.documentElement.classList.toggle("dark", scheme.matches);
    document.documentElement.classList.remove("drawn");
    for (const each of [...Bokeh.documents]) each.clear();
    Bokeh.documents.length = 0;
    for (const place of document.querySelectorAll(".plot")) await draw(place);
    document.documentElement.classList.add("drawn");
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".legend button");
    if (!button) return;
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    show(button);
  });
  // what follows the pointer is put at the end of the page; its own style has one blue for light pages and dark ones
  new MutationObserver((changes) => {
    for (const node of changes.flatMap((change) => [...change.addedNodes])) {
      if (!node.shadowRoot || !node.classList.contains("bk-Tooltip")) continue;
      const style = document.createElement("style");
      style.textContent = ".bk-tooltip-row-label { color: inherit; opacity: .75; } .bk-arrow, .bk-tooltip-arrow { display: none; }";
      node.shadowRoot.append(style);
    }
  }).observe(document.body, { childList: true });
  let drawing = draw_all();
  scheme.addEventListener("change", () => { drawing = drawing.then(draw_all); });
})();
