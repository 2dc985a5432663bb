// What all sections are made of. Text goes in as text nodes only, so nothing in the data can become markup.
const doc = JSON.parse(document.getElementById("document").textContent);

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

const number = (value, digits = 3) => (Math.abs(value) < 5e-4 && value ? value.toExponential(1) : value.toFixed(digits));
const signed = (value, digits = 4) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
const layerName = (layer) => (layer === null ? "–" : String(layer));
const distinct = (values) => [...new Set(values)];
const levels = distinct(doc.routers.map((router) => router.level)).sort((a, b) => b - a);
const projections = distinct(doc.routers.map((router) => router.projection));
const layers = distinct(doc.routers.map((router) => router.layer)).sort((a, b) => (a ?? 1e9) - (b ?? 1e9));
const routerAt = (layer, projection, level) =>
  doc.routers.find((r) => r.layer === layer && r.projection === projection && r.level === level);

function levelName(level) {
  if (levels.length === 1) return "";
  return level === levels[0] ? "Root" : level === 0 ? "Leaves" : `Level ${level}`;
}

function section(id, title, note, ...children) {
  const body = h("section", { id }, h("h2", {}, title), note ? h("p", { class: "note" }, note) : null, ...children);
  document.querySelector("main").append(body);
}

// A row of choices of which one is taken; calls back with it, at once and when it changes.
function choice(label, options, chosen, onchange) {
  const name = `choice-${choice.count = (choice.count ?? 0) + 1}`;
  const inputs = options.map(([value, text]) => {
    const input = h("input", { type: "radio", name, value: String(value), onchange: () => onchange(value) });
    input.checked = value === chosen;
    return h("label", {}, input, h("span", {}, text));
  });
  return h("fieldset", { class: "choice" }, h("legend", {}, label), inputs);
}

function select(label, options, chosen, onchange) {
  const list = h("select", { onchange: () => onchange(options[list.selectedIndex][0]) }, options.map(([, text]) => h("option", {}, text)));
  list.selectedIndex = options.findIndex(([value]) => value === chosen);
  return h("label", { class: "select" }, h("span", {}, label), list);
}

// A cell of a heat table. `heat` is in [-1, 1]; its sign is a hue, its size how much of it.
function cell(heat, text, tip, marked = false) {
  const sign = heat < 0 ? "low" : "high";
  return h("td", { class: marked ? `${sign} marked` : sign, "--heat": `${Math.round(Math.abs(heat) * 100)}%`, "data-tip": tip }, text);
}

const emptyCell = () => h("td", { class: "none" });

function heatTable(caption, columns, rows) {
  const head = h("tr", {}, h("td"), columns.map((name) => h("th", { scope: "col" }, name)));
  const body = rows.map(([name, cells]) => h("tr", {}, h("th", { scope: "row" }, name), cells));
  return h("div", { class: "scroll" }, h("table", { class: "heat" }, caption ? h("caption", {}, caption) : null, h("thead", {}, head), h("tbody", {}, body)));
}

function scaleOf(kind, ...ticks) {
  return h("p", { class: "scale", "aria-hidden": "true" }, h("span", { class: `ramp ${kind}` }), h("span", { class: "ticks" }, ticks.map((tick) => h("span", {}, tick))));
}

function figures(head, rows) {
  const cells = (row) => row.map((value, place) => (place ? h("td", {}, value) : h("th", { scope: "row" }, value)));
  return h("div", { class: "scroll" }, h("table", { class: "figures" },
    h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, cells(row))))));
}

// Light and dark: as the system has it, until the button says otherwise.
function setUpTheme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; show(); });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
}

// One line about what the pointer or the keyboard's focus is on.
function setUpTip() {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (event) => {
    const target = event.target.closest?.("[data-tip]");
    if (!target) return hide();
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const box = target.getBoundingClientRect();
    const top = box.top - tip.offsetHeight - 8;
    tip.style.top = `${top < 4 ? box.bottom + 8 : top}px`;
    tip.style.left = `${Math.max(8, Math.min(box.left + box.width / 2 - tip.offsetWidth / 2, innerWidth - tip.offsetWidth - 8))}px`;
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
}

function setUpContents() {
  const list = document.getElementById("contents");
  for (const part of document.querySelectorAll("main > section")) {
    list.append(h("a", { href: `#${part.id}` }, part.querySelector("h2").textContent));
  }
}
