// Layers x experts, one table a projection, one row of tables a tree level; and layers x projections.
const MEASURES = {
  usage: { name: "Against an even share", scale: ["ratio", "¼×", "½×", "even", "2×", "4×"] },
  load: { name: "Load", scale: ["plain", "0", "½", "1"] },
  share: { name: "Gate weight", scale: ["plain", "0", "½", "1"] },
};
const PLAIN_NAMES = { effective_experts: "Effective experts", entropy: "Entropy", balance: "Balance" };
const sum = (values) => values.reduce((total, value) => total + value, 0);

// How the work is divided, 1 = an even share: by load, or by gate weight where all experts are always taken.
function usage(router) {
  const values = router.picked < router.experts ? router.load : router.share;
  return values.map((value) => (value / sum(values)) * router.experts);
}

function expertCells(router, measure) {
  const even = usage(router);
  return even.map((times, expert) => {
    const [load, share] = [router.load[expert], router.share[expert]];
    const dead = router.dead.includes(expert);
    const place = `layer ${layerName(router.layer)} · ${router.projection} · expert ${expert}`;
    const tip = `${place}\nload ${number(load)}  gate weight ${number(share)}\n${number(times, 2)}× an even share${dead ? ", dead" : ""}`;
    const heat = { usage: Math.max(-1, Math.min(1, Math.log2(Math.max(times, 1e-9)) / 2)), load, share: Math.abs(share) }[measure];
    const shown = { usage: times, load, share }[measure];
    return cell(Math.max(-1, Math.min(1, heat)), number(shown), tip, dead);
  });
}

function expertTables(level, measure) {
  return projections.map((projection) => {
    const members = layers.map((layer) => routerAt(layer, projection, level)).filter(Boolean);
    if (!members.length) return null;
    const experts = Math.max(...members.map((router) => router.experts));
    const columns = [...Array(experts).keys()].map(String);
    return heatTable(projection, columns, members.map((router) => [layerName(router.layer), expertCells(router, measure)]));
  });
}

function expertSection() {
  const body = h("div");
  const draw = (measure) => {
    const groups = levels.map((level) => h("div", {}, levelName(level) ? h("h3", {}, levelName(level)) : null, h("div", { class: "panels" }, expertTables(level, measure))));
    body.replaceChildren(scaleOf(...MEASURES[measure].scale), h("div", { class: "levels" }, groups));
  };
  const options = Object.entries(MEASURES).map(([key, { name }]) => [key, name]);
  const note = "A row is a layer, a column an expert. Load: how often it is picked. Gate weight: its mean weight, 0 counted where it was not picked. × marks the dead.";
  section("experts", "Experts", note, choice("Colour", options, "usage", draw), body);
  draw("usage");
}

// Every plain number that all routers have can be looked at over layers and projections.
function plainMeasures() {
  const not = new Set(["layer", "level", "experts", "picked", "decisions"]);
  return Object.keys(doc.routers[0]).filter((key) => !not.has(key) && doc.routers.every((router) => typeof router[key] === "number"));
}

function routerTable(level, measure, range) {
  const rows = layers.map((layer) => [layerName(layer), projections.map((projection) => {
    const router = routerAt(layer, projection, level);
    if (!router) return emptyCell();
    const heat = (router[measure] - range[0]) / (range[1] - range[0] || 1);
    return cell(heat, number(router[measure]), `layer ${layerName(layer)} · ${projection}\n${router[measure]}`);
  })]);
  return heatTable(levelName(level), projections, rows);
}

function routerSection() {
  const measures = plainMeasures();
  const body = h("div");
  const draw = (measure) => {
    const values = doc.routers.map((router) => router[measure]);
    const range = [Math.min(...values), Math.max(...values)];
    const tables = levels.map((level) => routerTable(level, measure, range));
    body.replaceChildren(scaleOf("plain", number(range[0]), number(range[1])), h("div", { class: "panels wide" }, tables));
  };
  const nameOf = (key) => PLAIN_NAMES[key] ?? key.replaceAll("_", " ");
  section("routers", "Routers", "One number a router: a row is a layer, a column a projection.", choice("Number", measures.map((key) => [key, nameOf(key)]), measures[0], draw), body);
  draw(measures[0]);
}
