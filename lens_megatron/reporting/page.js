"use strict";
// Text from runs is put into the page as text only (textContent), never as markup.

const make = (tag, text, kind) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const short = (value) => (value === null || value === undefined ? "–" : String(Number(Number(value).toPrecision(4))));

// --- the line under the pointer, and what every series is there

const hover = make("div");
hover.id = "hover";
hover.hidden = true;
document.body.append(hover);

for (const svg of document.querySelectorAll('svg[data-kind="line"], svg[data-kind="step"]')) {
  const { low, high, start, end, log, unit } = svg.dataset;
  const scale = (value) => (log === "1" ? Math.log10(value) : Number(value));
  const toPixel = (x) => Number(start) + ((scale(x) - scale(low)) / (scale(high) - scale(low))) * (end - start);
  const series = [...svg.querySelectorAll("[data-points]")].map((path) => ({
    label: path.dataset.label,
    colour: path.style.stroke,
    points: path.dataset.points.split(" ").filter(Boolean).map((pair) => pair.split(",").map(Number)),
  }));
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cross.setAttribute("class", "cross");
  cross.setAttribute("y1", 26);
  cross.setAttribute("y2", svg.viewBox.baseVal.height - 40);
  cross.style.visibility = "hidden";
  svg.append(cross);

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = (points) => points.reduce((a, b) => (Math.abs(toPixel(b[0]) - at) < Math.abs(toPixel(a[0]) - at) ? b : a));
    const drawn = series.filter((one) => one.points.length);
    if (!drawn.length) return;
    const x = nearest(drawn.map((one) => nearest(one.points)))[0];
    cross.setAttribute("x1", toPixel(x));
    cross.setAttribute("x2", toPixel(x));
    cross.style.visibility = "visible";
    hover.replaceChildren(make("b", `${unit} ${short(x)}`));
    for (const one of drawn) {
      const point = nearest(one.points);
      if (Math.abs(toPixel(point[0]) - toPixel(x)) > 6) continue;
      const line = make("span");
      const swatch = make("i");
      swatch.style.background = one.colour;
      line.append(swatch, `${one.label}: ${short(point[1])}`);
      hover.append(line);
    }
    hover.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = hover;
    const left = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
    hover.style.left = `${Math.max(4, left)}px`;
    hover.style.top = `${Math.min(event.clientY + 14, innerHeight - height - 4)}px`;
  });
  svg.addEventListener("pointerleave", () => {
    hover.hidden = true;
    cross.style.visibility = "hidden";
  });
}

// --- the browser of rollouts

const browser = document.getElementById("browser");
if (browser) {
  const { runs } = JSON.parse(document.getElementById("rollouts").textContent);
  const [run, step, prompt] = ["run", "step", "prompt"].map((name) => browser.querySelector(`[name=${name}]`));
  const shown = browser.querySelector(".shown");
  const fill = (select, labels, chosen) => {
    select.replaceChildren(...labels.map((label, place) => {
      const option = make("option", label);
      option.value = place;
      return option;
    }));
    select.value = chosen;
  };
  const chosenStep = () => runs[run.value].steps[step.value];

  const describe = (entry) => {
    const originals = entry.rollouts.filter((one) => !one.purified);
    const purified = entry.rollouts.filter((one) => one.purified);
    const rate = (some) => `${some.filter((one) => one.success).length}/${some.length}`;
    return rate(originals) + (purified.length ? ` → ${rate(purified)} purified` : "");
  };

  const heatmap = (entry) => {
    const box = make("div", undefined, "heatmap");
    const gone = new Set(entry.deleted);
    entry.pieces.forEach((piece, place) => {
      const token = make(gone.has(place) ? "del" : "span", piece);
      const score = entry.scores[place];
      if (entry.shares[place] > 0) token.style.background = `rgba(var(--heat), ${(0.8 * entry.shares[place]).toFixed(3)})`;
      token.title = score === null ? "no score" : `score ${short(score)}${gone.has(place) ? ", deleted" : ""}`;
      box.append(token);
    });
    return box;
  };

  const card = (one) => {
    const box = make("div", undefined, one.success ? "rollout success" : "rollout");
    const chips = make("div", undefined, "chips");
    chips.append(make("span", one.success ? "success" : "failure", one.success ? "good" : "bad"));
    const facts = [`reward ${short(one.reward)}`];
    if (!["success", "failure"].includes(one.origin)) facts.push(one.origin.replace("_", " "));
    facts.push(one.trained ? "trained" : "not trained");
    if (one.advantage !== null) facts.push(`advantage ${short(one.advantage)}`);
    if (one.weight !== null) facts.push(`weight ${short(one.weight)}`);
    facts.push(`${one.tokens} tokens`, one.finish === "length" ? "cut at the limit" : one.finish);
    for (const fact of facts) chips.append(make("span", fact));
    box.append(chips, make("pre", one.text || "(empty response)"));
    return box;
  };

  const part = (title, some) => {
    const box = make("div");
    const cards = make("div", undefined, "rollouts");
    cards.append(...some.map(card));
    box.append(make("h3", `${title} (${some.length})`), cards);
    return box;
  };

  const showPrompt = () => {
    const at = chosenStep();
    const entry = at && at.prompts[prompt.value];
    if (!entry) {
      shown.replaceChildren(make("p", "No rollouts were saved.", "nothing"));
      return;
    }
    const facts = make("div", undefined, "chips");
    facts.append(make("span", `prompt ${entry.id}`), make("span", `answer ${entry.answer}`));
    if (entry.source) facts.append(make("span", entry.source));
    if (entry.deleted.length) facts.append(make("span", `${entry.deleted.length} of ${entry.pieces.length} tokens deleted`));
    const scored = entry.scores.some((score) => score !== null);
    const content = [facts, entry.pieces.length ? heatmap(entry) : make("div", entry.question, "heatmap")];
    if (!scored) content.push(make("p", "This prompt has no interference scores.", "soft"));
    const originals = entry.rollouts.filter((one) => !one.purified);
    const purified = entry.rollouts.filter((one) => one.purified);
    content.push(part("Rollouts of the original prompt", originals));
    if (purified.length) content.push(part("Rollouts of the purified prompt", purified));
    else content.push(make("p", "This prompt was not rolled out again: no purified rollouts.", "soft"));
    shown.replaceChildren(...content);
  };
  const showStep = () => {
    const at = chosenStep();
    const labels = at ? at.prompts.map((one) => `${describe(one)} · ${one.question.replace(/\s+/g, " ").slice(0, 70) || one.id}`) : [];
    fill(prompt, labels, 0);
    browser.querySelector(".count").textContent = at ? `${at.prompts.length} of the step's ${at.of} prompts are on this page.` : "";
    showPrompt();
  };
  const showRun = () => {
    const { steps } = runs[run.value];
    fill(step, steps.map((one) => `step ${one.step}`), Math.max(0, steps.length - 1));
    showStep();
  };
  run.addEventListener("change", showRun);
  step.addEventListener("change", showStep);
  prompt.addEventListener("change", showPrompt);
  fill(run, runs.map((one) => one.name), Math.max(0, runs.findIndex((one) => one.steps.some((at) => at.prompts.some((entry) => entry.deleted.length)))));
  showRun();
}
document.documentElement.dataset.ready = "yes";
