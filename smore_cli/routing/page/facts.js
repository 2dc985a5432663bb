// What routers tell of data sets and kinds of tokens, the tokens of their experts, and other adapters beside them.
const LABELS = { dataset: "data set", token_class: "kind of token" };

function informationTable(label, level, top) {
  const rows = layers.map((layer) => [layerName(layer), projections.map((projection) => {
    const told = routerAt(layer, projection, level)?.information?.[label];
    if (!told) return emptyCell();
    const beyond = told.bits > told.high;
    const tip = `layer ${layerName(layer)} · ${projection}\n${number(told.bits, 4)} bits of ${number(told.most, 2)}\nby chance ${number(told.chance, 4)}, 95 % of shuffles in [${number(told.low, 4)}, ${number(told.high, 4)}]\np = ${number(told.p, 3)}`;
    return cell(beyond ? Math.min(1, told.above_chance / top) : 0, number(told.above_chance, 3), tip);
  })]);
  return heatTable(levelName(level), projections, rows);
}

function informationSection() {
  const told = Object.keys(LABELS).filter((label) => doc.routers.every((router) => router.information?.[label]));
  if (!told.length) return;
  const body = h("div");
  const draw = (label) => {
    const top = Math.max(...doc.routers.map((router) => router.information[label].above_chance), 1e-9);
    body.replaceChildren(scaleOf("plain", "0", `${number(top)} bits`), h("div", { class: "panels wide" }, levels.map((level) => informationTable(label, level, top))));
  };
  const note = "Mutual information between the expert and the label, in bits above what shuffled labels give. What is inside 95 % of the shuffles has no colour: it cannot be told from noise.";
  section("information", "What experts specialise in", note, choice("Label", told.map((label) => [label, LABELS[label]]), told[0], draw), body);
  draw(told[0]);
}

function squareTable(caption, values, signedValues) {
  const names = values.map((_, expert) => String(expert));
  const rows = values.map((line, i) => [String(i), line.map((value, j) => cell(i === j && signedValues ? 0 : Math.max(-1, Math.min(1, value)), number(value, 2), `experts ${i} and ${j}\n${value}`))]);
  return heatTable(caption, names, rows);
}

function tokenSection() {
  const routers = doc.routers.filter((router) => router.top_tokens);
  if (!routers.length) return;
  const body = h("div");
  const draw = (index) => {
    const router = routers[index];
    const rows = router.top_tokens.map((tokens, expert) => [String(expert), tokens.length
      ? h("span", {}, tokens.map(({ token, count, usage, contexts }) => {
        const places = contexts.map((place) => `\n…${place.before}[${place.token}]${place.after}…`).join("");
        return h("span", { class: "token", tabindex: "0", "data-tip": `${JSON.stringify(token)}: ${count} times, usage ${number(usage, 3)}${places}` }, JSON.stringify(token), " ");
      }))
      : "–"]);
    const panels = [figures(["expert", "tokens that use it beyond its mean"], rows)];
    if (router.together) panels.push(squareTable("taken together", router.together, false));
    if (router.similarity) panels.push(squareTable("cosine of the updates", router.similarity, true));
    body.replaceChildren(h("div", { class: "panels" }, panels));
  };
  const nameOf = (router) => `${layerName(router.layer)}.${router.projection}${levelName(router.level) ? ` · ${levelName(router.level)}` : ""}`;
  section("tokens", "Tokens of an expert", "The tokens that use an expert most beyond its mean use; which experts are taken together.", select("Router", routers.map((router, index) => [index, nameOf(router)]), 0, draw), body);
  draw(0);
}

function besideSection() {
  const others = [...(doc.drift ?? []), ...(doc.compare ? [doc.compare] : [])];
  if (!others.length) return;
  const nameOf = (other) => (other.step === null ? other.run : `step ${other.step}`);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const rows = others.map((other) => [nameOf(other), other.mean_total_variation === null ? "–" : number(other.mean_total_variation, 4), number(mean(other.routers.map((router) => router.effective_experts)), 2)]);
  const near = others.filter((other) => other.mean_total_variation !== null);
  const body = h("div");
  const draw = (index) => {
    const far = new Map(near[index].routers.map((router) => [`${router.module} ${router.level}`, router.total_variation]));
    const top = Math.max(...[...far.values()].filter((value) => value !== null), 1e-9);
    const tables = levels.map((level) => heatTable(levelName(level), projections, layers.map((layer) => [layerName(layer), projections.map((projection) => {
      const router = routerAt(layer, projection, level);
      const value = router && far.get(`${router.module} ${level}`);
      if (value === undefined || value === null) return emptyCell();
      return cell(value / top, number(value), `layer ${layerName(layer)} · ${projection}\ntotal variation ${value}`);
    })])));
    body.replaceChildren(scaleOf("plain", "0", number(top)), h("div", { class: "panels wide" }, tables));
  };
  const last = near.length - 1;
  const shown = near.length ? [select("Shown", near.map((other, index) => [index, nameOf(other)]), last, draw), body] : [];
  section("beside", "The same rows elsewhere", "How far the experts' shares are from this run's: half the sum of their differences, 0 where they are the same, 1 where none is in common. – where the two have no router in common.", figures(["", "total variation, mean", "effective experts, mean"], rows), ...shown);
  if (near.length) draw(last);
}
