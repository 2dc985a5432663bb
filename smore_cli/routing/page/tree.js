// The tree of one router: a branch is as thick as often it is on the path that is taken.
const DRAWN_PATHS = 64;
const TREE = { row: 17, column: 150, thickest: 14, left: 14 };

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const pathName = (path) => path.join(" › ");
const percent = (share) => `${number(100 * share, 1)} %`;

// Paths that begin alike share a node; a node's share is that of all paths through it.
function grow(paths) {
  const root = { path: [], share: 0, children: new Map() };
  for (const { path, share } of paths) {
    let node = root;
    node.share += share;
    path.forEach((expert, depth) => {
      if (!node.children.has(expert)) node.children.set(expert, { path: path.slice(0, depth + 1), share: 0, children: new Map() });
      node = node.children.get(expert);
      node.share += share;
    });
  }
  return root;
}

function place(node, next) {
  const children = [...node.children.values()].sort((a, b) => a.path.at(-1) - b.path.at(-1));
  node.below = children;
  children.forEach((child) => place(child, next));
  if (children.length) next.row += 0.4;
  node.x = TREE.left + TREE.column * node.path.length;
  node.y = children.length ? sum(children.map((child) => child.y)) / children.length : TREE.row * (next.row++ + 0.8);
  return node;
}

function branches(node, thickest, experts) {
  return node.below.flatMap((child) => {
    const expert = child.path.at(-1);
    const colour = { "--hue": hue(expert, experts[child.path.length - 1]) };
    const middle = (node.x + child.x) / 2;
    const tip = `${pathName(child.path)}\n${percent(child.share)} of the paths`;
    const line = svg("path", { ...colour, d: `M${node.x},${node.y} C${middle},${node.y} ${middle},${child.y} ${child.x},${child.y}`, "stroke-width": Math.max(0.6, (TREE.thickest * child.share) / thickest), "data-tip": tip });
    const dot = svg("circle", { ...colour, cx: child.x, cy: child.y, r: 3.5, "data-tip": tip });
    const label = child.below.length
      ? svg("text", { x: child.x, y: child.y - 9, "text-anchor": "middle" }, String(expert))
      : svg("text", { x: child.x + 9, y: child.y + 4 }, `${expert} · ${percent(child.share)}`);
    return [line, ...branches(child, thickest, experts), dot, label];
  });
}

function drawTree(router) {
  const next = { row: 0 };
  const root = place(grow(router.paths.slice(0, DRAWN_PATHS)), next);
  const depth = router.paths[0].path.length;
  const experts = levels.map((level) => routerAt(router.layer, router.projection, level).experts);
  const [width, height] = [TREE.left + TREE.column * depth + 80, TREE.row * (next.row + 0.6)];
  const thickest = Math.max(...root.below.map((child) => child.share));
  const name = `Tree of layer ${layerName(router.layer)}, ${router.projection}: ${router.paths.length} paths, the most frequent ${pathName(router.paths[0].path)}`;
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name }, ...branches(root, thickest, experts), svg("circle", { cx: root.x, cy: root.y, r: 4, "--hue": "250" }));
}

function treeSection() {
  const trees = doc.routers.filter((router) => router.paths);
  if (!trees.length || levels.length < 2) return;
  const state = { layer: trees[0].layer, projection: trees[0].projection };
  const body = h("div", { class: "tree" });
  const draw = (change = {}) => {
    Object.assign(state, change);
    const router = trees.find((tree) => tree.layer === state.layer && tree.projection === state.projection);
    if (!router) return body.replaceChildren("There is no tree here.");
    const rows = router.paths.slice(0, 10).map(({ path, share }) => [pathName(path), percent(share)]);
    const possible = levels.map((level) => routerAt(router.layer, router.projection, level).experts).reduce((a, b) => a * b);
    const taken = h("p", { class: "note" }, `${router.paths.length} of ${possible} paths are taken; an even share is ${percent(1 / possible)}.`);
    body.replaceChildren(drawTree(router), h("div", {}, taken, figures(["most frequent paths", "share"], rows)));
  };
  const name = (values, words) => values.map((value) => [value, words(value)]);
  const controls = [
    select("Layer", name(distinct(trees.map((tree) => tree.layer)), layerName), state.layer, (layer) => draw({ layer })),
    choice("Projection", name(distinct(trees.map((tree) => tree.projection)), String), state.projection, (projection) => draw({ projection })),
  ];
  const note = `Every token takes several paths from the root to a leaf. A branch is as thick as often it is taken${trees.some((tree) => tree.paths.length > DRAWN_PATHS) ? `; the ${DRAWN_PATHS} most frequent paths are drawn` : ""}.`;
  section("tree", "Trees", note, h("div", { class: "controls" }, controls), body);
  draw();
}
