// One text: its tokens coloured by the expert of the largest gate, and below it all layers at once.
const hue = (expert, experts) => String(Math.round(250 + (360 * expert) / experts) % 360);
const visible = (token) => token.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "→");

function gatesOf(router) {
  const bytes = atob(router.gates);
  const value = (place) => ((bytes.charCodeAt(place) << 24) >> 24) * router.scale;
  return doc.trace.tokens.map((_, token) => [...Array(router.experts).keys()].map((expert) => value(token * router.experts + expert)));
}

function heaviest(gates) {
  return gates.reduce((best, gate, expert) => (Math.abs(gate) > Math.abs(gates[best]) ? expert : best), 0);
}

function gateTip(router, token, gates) {
  const picked = gates.map((gate, expert) => [gate, expert]).filter(([gate]) => gate).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
  const shown = picked.slice(0, 8).map(([gate, expert]) => `expert ${expert}  ${number(gate, 2)}`);
  const more = picked.length > 8 ? [`and ${picked.length - 8} more`] : [];
  return [`“${visible(token)}” · layer ${layerName(router.layer)} · ${router.projection}`, ...shown, ...more].join("\n");
}

function coloured(tag, router, token, gates, attributes, ...children) {
  const expert = heaviest(gates);
  const part = Math.abs(gates[expert]) / (sum(gates.map(Math.abs)) || 1);
  const colour = { "--hue": hue(expert, router.experts), "--part": `${Math.round(25 + 75 * part)}%` };
  return h(tag, { ...colour, ...attributes, "data-tip": gateTip(router, token, gates), "data-expert": expert }, ...children);
}

function tokenLine(router) {
  const gates = gatesOf(router);
  const tokens = doc.trace.tokens.flatMap((token, place) => {
    const node = coloured("span", router, token, gates[place], { class: "token", tabindex: 0 }, token.replaceAll("\n", "⏎") || "∅");
    return token.includes("\n") ? [node, h("br")] : [node];
  });
  return h("p", { class: "tokens" }, tokens);
}

function strip(members, chosen, onchoose) {
  const head = h("tr", {}, h("td"), doc.trace.tokens.map((token) => h("th", { scope: "col" }, h("span", {}, visible(token)))));
  const rows = members.map((router) => {
    const gates = gatesOf(router);
    const name = h("button", { type: "button", "aria-pressed": String(router === chosen), onclick: () => onchoose(router) }, layerName(router.layer));
    const cells = doc.trace.tokens.map((token, place) => coloured("td", router, token, gates[place], {}, String(heaviest(gates[place]))));
    return h("tr", { class: router === chosen ? "chosen" : null }, h("th", { scope: "row" }, name), cells);
  });
  return h("div", { class: "scroll" }, h("table", { class: "heat strip" }, h("caption", {}, "The heaviest expert, layer by layer"), h("thead", {}, head), h("tbody", {}, rows)));
}

function expertKey(experts) {
  return h("p", { class: "key" }, "experts ", [...Array(experts).keys()].map((expert) => h("span", { "--hue": hue(expert, experts), "--part": "100%" }, String(expert))));
}

function traceSection() {
  if (!doc.trace) return;
  const routers = doc.trace.routers;
  const state = { projection: routers[0].projection, level: routers[0].level, layer: routers[0].layer };
  const body = h("div");
  const draw = (change = {}) => {
    Object.assign(state, change);
    const members = routers.filter((router) => router.projection === state.projection && router.level === state.level);
    const chosen = members.find((router) => router.layer === state.layer) ?? members[0];
    body.replaceChildren(h("p", { class: "where" }, `Layer ${layerName(chosen.layer)} · ${chosen.projection}`), expertKey(chosen.experts), tokenLine(chosen), strip(members, chosen, (router) => draw({ layer: router.layer })));
  };
  const cut = doc.trace.all_tokens > doc.trace.tokens.length ? ` The first ${doc.trace.tokens.length} of its ${doc.trace.all_tokens} tokens are in this page.` : "";
  const note = `The text ${doc.trace.style}. A token has the colour of the expert with the largest gate weight, the fuller the more of the weight is on it.${cut}`;
  const controls = [choice("Projection", distinct(routers.map((r) => r.projection)).map((name) => [name, name]), state.projection, (projection) => draw({ projection }))];
  if (levels.length > 1) controls.push(choice("Level", levels.map((level) => [level, levelName(level)]), state.level, (level) => draw({ level })));
  section("trace", "Trace of a text", note, h("div", { class: "controls" }, controls), body);
  draw();
}
