// What pages gain from JavaScript: copying, charts, forms that answer at once. Nothing needs it.
(() => {
  "use strict";
  const announcer = document.getElementById("announcer");

  function announce(text) {
    // Emptied first, so that the same words are spoken again.
    announcer.textContent = "";
    setTimeout(() => { announcer.textContent = text; }, 50);
  }

  async function copy(button) {
    const source = document.getElementById(button.dataset.copy);
    const text = "value" in source ? source.value : source.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without TLS, or without leave: select it and let the browser copy the selection.
      if ("select" in source) source.select(); else getSelection().selectAllChildren(source);
      if (!document.execCommand("copy")) {
        announce("Copying is not possible here. The text is selected.");
        return;
      }
    }
    const before = button.dataset.before ?? button.innerHTML;
    button.dataset.before = before;
    button.textContent = "Copied";
    announce(button.dataset.said);
    setTimeout(() => { button.innerHTML = before; }, 2000);
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function draw(element) {
    const data = JSON.parse(element.dataset.chart);
    const bars = uPlot.paths.bars({ size: [0.7, 40] });
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const number = new Intl.NumberFormat("en");
    // Refusals stand on top of what passed: drawn first, as the sum of both.
    const sum = data[1].map((passed, index) => passed + data[2][index]);
    const series = (label, name, value) => ({ label, value, fill: colour(name), stroke: colour(name), width: 0, paths: bars, points: { show: false } });
    const shown = (column) => (_, __, ___, index) => index === null ? "–" : number.format(data[column][index]);
    const step = data[0][1] - data[0][0];
    const options = {
      width: element.clientWidth, height: 220, padding: [12, 8, 0, 0], tzDate: (s) => uPlot.tzDate(new Date(s * 1e3), "Etc/UTC"),
      cursor: { points: { show: false }, drag: { x: false, y: false } },
      scales: { x: { range: (_, min, max) => [min - step / 2, max + step / 2] }, y: { range: (_, __, max) => [0, Math.max(5, max * 1.1)] } },
      axes: [{ ...axis, grid: { show: false }, values: timeValues }, { ...axis, size: 56, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 1e7, 1e8, 1e9], values: (_, ticks) => ticks.map((tick) => number.format(tick)) }],
      series: [
        { label: "UTC", value: (_, at) => at === null ? "–" : new Date(at * 1e3).toISOString().slice(0, 16).replace("T", " ") },
        series("Refused", "--refused", shown(2)),
        series("Passed", "--passed", shown(1)),
      ],
    };
    element.textContent = "";
    return new uPlot(options, [data[0], sum, data[1]], element);
  }

  function timeValues(_, ticks, __, ___, step) {
    return ticks.map((tick) => {
      const date = new Date(tick * 1e3);
      const day = date.toLocaleDateString("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });
      return step >= 86400 ? day : date.toISOString().slice(11, 16);
    });
  }

  function charts() {
    if (!window.uPlot) return;
    const elements = [...document.querySelectorAll("[data-chart]")];
    let plots = elements.map(draw);
    const again = () => { plots.forEach((plot) => plot.destroy()); plots = elements.map(draw); };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; again(); } });
  }

  function tick(form, preset) {
    for (const box of form.querySelectorAll("input[name=scope]")) {
      box.checked = preset === "all" || (preset === "read" && "reads" in box.dataset);
    }
    announce(`${form.querySelectorAll("input[name=scope]:checked").length} scopes ticked`);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.copy) copy(button);
    if (button?.dataset.preset) { event.preventDefault(); tick(button.form, button.dataset.preset); }
  });
  document.addEventListener("focusin", (event) => { if (event.target.matches("input.secret")) event.target.select(); });
  document.addEventListener("change", (event) => {
    const form = event.target.closest("form[data-auto]");
    if (form && event.target.matches("select")) form.requestSubmit();
  });
  // Typing another length chooses it.
  document.getElementById("own_number")?.addEventListener("input", () => { document.querySelector("input[name=grace][value=own]").checked = true; });

  for (const button of document.querySelectorAll("[data-copy]")) button.hidden = false;
  for (const select of document.querySelectorAll("[data-shows]")) {
    const show = () => { document.getElementById(select.dataset.shows).hidden = select.value !== select.dataset.on; };
    select.addEventListener("change", show);
    show();
  }
  // A form of choices alone goes off by itself.
  for (const form of document.querySelectorAll("form[data-auto]")) {
    if (!form.querySelector("input:not([type=hidden])")) form.querySelector("button").hidden = true;
  }
  charts();
})();
