"use strict";
(() => {
  const GIB = 2 ** 30;
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const chart = $("chart"), state = $("state"), knobs = $("knobs");
  const binding = data.plan.binding_phase;
  const components = Object.keys(data.plan.phases[0].components);
  const asText = (bytes) => (bytes / GIB).toFixed(2);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  let shown = data.planned;

  // One bar a phase, from the top in the order of a step. What lies beyond the edge is cut there and says its size.
  function figure() {
    const phases = shown.phases, names = phases.map((phase) => phase.name);
    const narrow = chart.clientWidth < 560;
    const capacity = data.plan.hardware.capacity_bytes / GIB;
    const largest = Math.max(...phases.map((p) => p.needed_bytes / GIB));
    const edge = Math.max(capacity, Math.min(largest, 1.3 * capacity)) * 1.06;
    const [ink, soft, line, bad] = ["ink", "soft", "line", "bad"].map(colour);
    const traces = components.filter((name) => phases.some((p) => p.components[name])).map((name) => ({
      type: "bar", orientation: "h", name, y: names, x: phases.map((p) => p.components[name] / GIB),
      marker: { color: colour(name), line: { width: 0 } }, hovertemplate: `%{y}<br>${name} %{x:.2f} GiB<extra></extra>`,
    }));
    const mark = (name, values, marker) => ({
      type: "scatter", mode: "markers", name, y: names, x: values.map((v) => Math.min(v, 0.985 * edge)), customdata: values, cliponaxis: false,
      marker: { color: ink, ...marker }, hovertemplate: `%{y}<br>${name} %{customdata:.2f} GiB<extra></extra>`,
    });
    traces.push(mark("budget", phases.map((p) => p.budget_bytes / GIB), { symbol: "line-ns-open", size: narrow ? 20 : 27, line: { width: 3, color: ink } }));
    const others = data.plan.changes.length && shown === data.planned ? data.asked.phases.filter((p) => names.includes(p.name)) : [];
    const differ = others.filter((p) => Math.abs(p.needed_bytes - phases[names.indexOf(p.name)].needed_bytes) > GIB / 100);
    if (differ.length) {
      const symbol = differ.map((p) => (p.needed_bytes / GIB > edge ? "triangle-right-open" : "diamond-open"));
      const asked = mark("asked", differ.map((p) => p.needed_bytes / GIB), { symbol, size: 11, color: bad, line: { width: 2 } });
      traces.push({ ...asked, y: differ.map((p) => p.name) });
    }
    const size = narrow ? 11 : 13;
    const says = phases.map((p) => ({
      x: 1, xref: "paper", xanchor: "left", xshift: 8, y: p.name, yanchor: "middle", showarrow: false, align: "left",
      text: `${p.name === binding ? "<b>" : ""}${asText(p.needed_bytes)}${narrow ? "" : ` of ${asText(p.budget_bytes)}`}${p.name === binding ? "</b>" : ""}`,
      font: { size, color: p.fits ? ink : bad },
    }));
    return [traces, {
      barmode: "stack", bargap: 0.34, showlegend: false, dragmode: false, annotations: says, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size, color: ink },
      height: 44 * Math.max(names.length, 2) + 70, margin: { l: narrow ? 116 : 140, r: narrow ? 62 : 142, t: 6, b: 46 },
      xaxis: { range: [0, edge], fixedrange: true, ticksuffix: "", title: { text: "GiB of one GPU", font: { size, color: soft } }, gridcolor: line, zeroline: false, tickfont: { color: soft } },
      yaxis: { ticklabelstandoff: 6, autorange: "reversed", fixedrange: true, tickvals: names, ticktext: names.map((n) => (n === binding ? `<b>▶ ${n}</b>` : n)) },
      shapes: [
        { type: "line", x0: capacity, x1: capacity, y0: 0, y1: 1, yref: "paper", line: { color: soft, width: 1, dash: "dot" } },
        { type: "rect", layer: "below", x0: 0, x1: 1, xref: "paper", y0: names.indexOf(binding) - 0.5, y1: names.indexOf(binding) + 0.5, fillcolor: line, opacity: 0.45, line: { width: 0 } },
      ].filter((shape) => shape.type === "line" || names.includes(binding)),
    }];
  }
  const draw = () => window.Plotly && window.Plotly.react(chart, ...figure(), { displayModeBar: false, responsive: true });

  function say(text, fits) {
    state.textContent = text;
    state.classList.toggle("dies", !fits);
  }
  function press(view) {
    for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
  function show(view) {
    const phases = data[view].phases;
    shown = data[view];
    press(view);
    const tightest = view === "planned" ? phases.find((p) => p.name === binding) : phases.find((p) => !p.fits) || phases.find((p) => p.name === binding);
    const over = tightest.fits ? "" : ", too much";
    say(`${view === "asked" ? "As asked" : data.plan.fits ? "The plan" : "The best attempt"}: ${tightest.name} needs ${asText(tightest.needed_bytes)} of ${asText(tightest.budget_bytes)} GiB${over}`, data[view].fits);
    draw();
  }

  // What if: one knob away from the plan; all others go back.
  function place(field, index) {
    const knob = data.what_if[field.dataset.knob], value = knob.choices[index].value;
    const range = field.querySelector("input[type=range]");
    if (range) { range.value = index; range.setAttribute("aria-valuetext", value); }
    else field.querySelectorAll("input")[index].checked = true;
    field.querySelector("output").textContent = value;
    field.classList.toggle("moved", index !== knob.now);
  }
  function reset(except) {
    for (const field of document.querySelectorAll(".knob")) if (field !== except) place(field, data.what_if[field.dataset.knob].now);
  }
  function turn(event) {
    const field = event.target.closest(".knob"), index = Number(event.target.value);
    const knob = data.what_if[field.dataset.knob], choice = knob.choices[index];
    reset(field);
    place(field, index);
    if (index === knob.now) return show("planned");
    shown = choice;
    press("");
    const follow = Object.entries(choice.with).map(([key, value]) => `${key}=${value}`).join(", ");
    const name = knob.key.split(".").slice(-2).join(".");
    say(`${name} = ${choice.value}${follow ? ` (with ${follow})` : ""}: ${choice.verdict}. `, choice.fits);
    const back = document.createElement("button");
    back.type = "button"; back.textContent = "Back to the plan";
    back.addEventListener("click", () => { reset(null); show("planned"); });
    state.append(back);
    return draw();
  }

  async function load() {
    if (!window.DecompressionStream) throw new Error("no DecompressionStream");
    const packed = Uint8Array.from(atob($("library").textContent), (char) => char.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => { reset(null); show(button.dataset.view); });
  if (knobs) knobs.addEventListener("input", turn);
  for (const button of document.querySelectorAll(".copy-button")) {
    button.addEventListener("click", async () => {
      const text = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch { // no clipboard for files in this browser: one key is left to press
        getSelection().selectAllChildren(text);
        button.textContent = "Selected";
      }
    });
  }
  for (const link of document.querySelectorAll(".to-formula")) link.addEventListener("click", () => { $("formulas").open = true; });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  reset(null);
  show("planned");
  load().then(() => { draw(); document.documentElement.dataset.drawn = "true"; }).catch(() => {
    chart.textContent = "The chart needs a newer browser; the table below has its numbers.";
  });
})();
