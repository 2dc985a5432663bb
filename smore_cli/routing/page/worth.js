// What experts and routing are worth, where that was measured.
function effectTable(name, effects, kind, top) {
  const rows = distinct(effects.map((effect) => effect.layer)).map((layer) => {
    const here = effects.filter((effect) => effect.layer === layer);
    return [layerName(layer), here.map((effect) => {
      const { value, stderr } = effect[kind];
      const noise = Math.abs(value) <= 2 * stderr;
      const tip = `layer ${layerName(layer)} · expert ${effect.expert}\n${signed(value)} ± ${number(stderr, 4)} nats a token${noise ? "\nwithin two standard errors of none" : ""}`;
      return cell(noise ? 0 : Math.max(-1, Math.min(1, value / top)), signed(value), tip);
    })];
  });
  const experts = Math.max(...effects.map((effect) => effect.expert)) + 1;
  return heatTable(name, [...Array(experts).keys()].map(String), rows);
}

function causalSection() {
  if (!doc.causal) return;
  const { effects, loss, supervised_tokens: tokens } = doc.causal;
  const kinds = [["ablated", "without it"], ["forced", "with nothing but it"]];
  const groups = distinct(effects.map((effect) => effect.level)).map((level) => {
    const here = effects.filter((effect) => effect.level === level);
    const tables = kinds.map(([kind, words]) => {
      const top = Math.max(...here.map((effect) => Math.abs(effect[kind].value))) || 1;
      return h("div", {}, effectTable(words, here, kind, top), scaleOf("signed", signed(-top), "0", signed(top)));
    });
    return h("div", {}, levelName(level) ? h("h3", {}, levelName(level)) : null, h("div", { class: "panels" }, tables));
  });
  const note = `How the loss, ${number(loss, 4)} nats a token over ${tokens.toLocaleString("en")} supervised tokens, changes without an expert, and with nothing but it. What is within two standard errors of none has no colour.`;
  section("causal", "What an expert is worth", note, h("div", { class: "levels" }, groups));
}

function dividendSection() {
  if (!doc.dividend) return;
  const { loss, dividend, stderr, share, layers: parts } = doc.dividend;
  const earned = share === null ? "the adapter gained nothing" : `${number(100 * share, 1)} % of the adapter's gain`;
  const note = `Routing dividend ${signed(dividend)} ± ${number(stderr, 4)} nats a token: ${earned}. It is the loss of the best update that is the same for all tokens, less that of the routed one.`;
  const rows = [["backbone", loss.base], ["best static update", loss.static], ["routed", loss.routed]];
  const shown = [figures(["model", "loss"], rows.map(([name, value]) => [name, number(value, 4)]))];
  if (parts.length) {
    const cells = parts.map((part) => [layerName(part.layer), number(part.static, 4), `${signed(part.value)} ± ${number(part.stderr, 4)}`]);
    shown.push(h("h3", {}, "One layer made static, all others routed"), figures(["layer", "loss", "dividend"], cells));
  }
  section("dividend", "What routing earned", note, ...shown);
}
