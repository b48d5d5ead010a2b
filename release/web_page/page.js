"use strict";
// The page of a release. Data comes from the JSON in the page and from parts: scripts that call atomPart. Foreign text
// reaches the document as text only.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (name) => document.getElementById(name);

// --- parts ---

const waiting = new Map();
const parts = new Map();

window.atomPart = (name, value) => waiting.get(name)?.resolve(value);

function part(name) {
  if (!parts.has(name)) {
    parts.set(name, new Promise((resolve, reject) => {
      waiting.set(name, { resolve });
      const script = document.createElement("script");
      script.src = name.split("/").map(encodeURIComponent).join("/") + ".js";
      script.onload = () => reject(new Error(`${name}.js holds another part`));
      script.onerror = () => {
        parts.delete(name);
        reject(new Error(`${name}.js cannot be loaded; open the page inside the folder of the release`));
      };
      document.head.append(script);
    }));
  }
  return parts.get(name);
}

// --- text ---

// Marks that turn the direction of text, and controls, are shown by their numbers.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff]/;

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function foreign(text, tag = "span", known = null) {
  const element = make(tag, { dir: "auto" });
  let plain = "";
  const flush = () => { highlight(element, plain, known); plain = ""; };
  for (const sign of text) {
    if (HIDDEN.test(sign)) {
      flush();
      const number = sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      element.append(make("span", { class: "sign" }, `[U+${number}]`));
    } else plain += sign;
  }
  flush();
  return element;
}

function highlight(element, text, known) {
  if (!known || !known.size) { element.append(text); return; }
  let end = 0;
  for (const match of text.matchAll(WORD)) {
    if (!known.has(cut(match[0].toLowerCase()))) continue;
    element.append(text.slice(end, match.index), make("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  element.append(text.slice(end));
}

const count = (number) => number.toLocaleString("en-US");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

// --- links to files: in this folder, or on the Hub where the page is served from there ---

const onHub = /(^|\.)(huggingface\.co|hf\.space)$/.test(location.hostname);

function hubAddress(path) {
  const [top, ...rest] = path.split("/");
  const escaped = (names) => names.map(encodeURIComponent).join("/");
  const view = /(\.[A-Za-z0-9]+|(^|\/)[A-Z][A-Za-z0-9]+)$/.test(path) ? "blob" : "tree"; // NOTICE and LICENSE are files
  const address = (repository, names) => `https://huggingface.co/${repository}/${view}/${escaped(names)}`;
  const name = DATA.repository, tag = DATA.tag; // a later version of the release moves `main`, and not the tag
  if (top === "dataset") return address(`datasets/${name}-data`, [tag, ...rest]);
  if (top === "checkpoints") return address(`${name}-checkpoints`, /-step-\d+$/.test(rest[0]) ? rest : [tag, ...rest]);
  if (/^model(-|$)/.test(top)) return address(`${name}${top.slice(5)}`, [tag, ...rest]);
  if (/^variant-/.test(top)) return address(`${name}${top.slice(7)}`, [tag, ...rest]);
  return address(`datasets/${name}-evidence`, [tag, top, ...rest]);
}

function fileLink(path, text = path) {
  const local = "../" + path.split("/").map(encodeURIComponent).join("/");
  const link = make("a", { class: "file", href: local, "data-path": path }, foreign(text));
  if (onHub) leadToHub(link);
  return link;
}

function leadToHub(link) { // in a tab of its own: the Hub shows a Space in a frame, and none of its own pages in one
  link.href = hubAddress(link.dataset.path);
  link.target = "_blank";
  link.rel = "noopener";
}

if (onHub) for (const link of document.querySelectorAll("a.file[data-path]")) leadToHub(link);

// --- search ---

const WORD = /[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])[\p{L}\p{N}])+/gu;
const LONGEST_WORD = 40;
const SHOWN = 10;
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const VALUES = new Map([...DIGITS].map((digit, value) => [digit, value]));
const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

const cut = (word) => [...word].slice(0, LONGEST_WORD).join("");

function crc32(text) {
  let crc = 0xffffffff;
  for (const byte of new TextEncoder().encode(text)) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

function decoded(postings) {
  const documents = new Map();
  let number = 0, value = 0, scale = 1;
  for (const sign of postings) {
    const digit = VALUES.get(sign);
    value += (digit & 31) * scale;
    scale *= 32;
    if (digit < 32) {
      number += Math.floor(value / 16);
      documents.set(number, value % 16);
      value = 0; scale = 1;
    }
  }
  return documents;
}

async function matches(query) {
  const about = await part("search/about");
  const words = [...new Set((query.toLowerCase().match(WORD) || []).map(cut))];
  if (!words.length) return { words, hits: [], about };
  const lists = await Promise.all(words.map(async (word) => {
    const terms = await part(`search/terms-${crc32(word) % about.bins}`);
    return Object.hasOwn(terms, word) ? { weight: terms[word][0], documents: decoded(terms[word][1]) } : null;
  }));
  if (lists.includes(null)) return { words, hits: [], about, missing: words.filter((_, n) => !lists[n]) };
  lists.sort((a, b) => a.documents.size - b.documents.size);
  const hits = [];
  for (const number of lists[0].documents.keys()) {
    if (lists.every((list) => list.documents.has(number))) {
      hits.push([number, lists.reduce((sum, list) => sum + list.weight * list.documents.get(number), 0)]);
    }
  }
  hits.sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  return { words, hits, about };
}
window.atomSearch = async (query) => (await matches(query)).hits;

function seenBy(seen, phases) {
  const list = make("ul");
  if (!seen.length) {
    list.append(make("li", {}, "No step in the orders of this run read it."));
    return list;
  }
  let first = null;
  for (const [phase, total, steps] of seen) {
    const name = phases[phase];
    const row = make("li", {}, make("b", {}, name), ` at ${plural(total, "step")}: `);
    steps.forEach((step, n) => {
      row.append(n ? ", " : "", count(Math.abs(step)), step < 0 ? " (moved no weight)" : "");
      if (step > 0) first ??= [DATA.phases.indexOf(name), step];
    });
    if (total > steps.length) row.append(", …");
    row.append(" (", fileLink(`dataset/order/${name}`, "order"), ")");
    list.append(row);
  }
  if (!first) return list;
  const after = ([, step, phase]) => { const n = DATA.phases.indexOf(phase); return n > first[0] || (n === first[0] && step >= first[1]); };
  const checkpoints = DATA.checkpoints.filter(after);
  const row = make("li", {}, `${plural(checkpoints.length, "checkpoint")} after the first of these steps: `);
  checkpoints.slice(0, 4).forEach(([phase, step], n) => row.append(n ? ", " : "", fileLink(`checkpoints/${phase}-step-${step}`, `${phase} ${step}`)));
  if (checkpoints.length > 4) row.append(", …");
  const models = DATA.models.filter(([, phase]) => DATA.phases.indexOf(phase) >= first[0]);
  const trained = make("li", {}, "Models trained on it: ");
  models.forEach(([model, , folder], n) => trained.append(n ? ", " : "", folder ? fileLink(folder, model) : model));
  list.append(row, trained);
  return list;
}

function hit(row, phases, words) {
  const [id, source, license, origin, heldOut, text, whole, seen] = row;
  const item = make("li", {}, make("h4", {}, foreign(id, "bdi")));
  const meta = make("p", { class: "meta" }, "source ", foreign(source, "bdi"), " · license ", foreign(license, "bdi"), " · origin ", foreign(origin, "bdi"));
  item.append(meta);
  if (text === null) item.append(make("p", { class: "meta" }, "Its text is by reference: the release names it and does not contain it."));
  else item.append(foreign(text + (whole ? "" : " …"), "div", words));
  item.lastChild.classList.add(text === null ? "meta" : "text");
  const title = heldOut ? "Held out: no phase trains on it" : "Steps, checkpoints and models that saw it";
  item.append(make("details", {}, make("summary", {}, title), seenBy(seen, phases)));
  item.append(make("p", { class: "meta" }, make("code", {}, foreign(`atom trace . --doc '${id.replaceAll("'", "'\\''")}'`))));
  return item;
}

let latest = 0;

async function search(query) {
  const turn = ++latest, status = byId("search-status"), list = byId("hits"), pager = byId("search-more");
  list.replaceChildren();
  pager.hidden = true;
  status.textContent = query.trim() ? "Searching …" : "";
  if (!query.trim()) return;
  try {
    const { words, hits, about, missing } = await matches(query);
    if (turn !== latest) return;
    const known = new Set(words);
    const scope = about.documents < about.of ? `${count(about.documents)} searchable of ${count(about.of)}` : count(about.of);
    status.textContent = missing ? `No document has the word ${missing.join(", ")}.` : `${plural(hits.length, "document")} of ${scope} with all words.`;
    let shown = 0;
    const more = async () => {
      const next = hits.slice(shown, shown + SHOWN);
      const rows = await Promise.all(next.map(([n]) => part(`search/documents-${Math.floor(n / about.perPart)}`)));
      if (turn !== latest) return;
      next.forEach(([n], at) => list.append(hit(rows[at][n % about.perPart], about.phases, known)));
      shown += next.length;
      pager.hidden = shown >= hits.length;
    };
    pager.onclick = () => more().catch((error) => { status.textContent = error.message; });
    await more();
    document.body.dataset.searched = query;
  } catch (error) {
    status.textContent = error.message;
  }
}

function searchFor(query) {
  byId("query").value = query;
  history.replaceState(null, "", `#q=${encodeURIComponent(query)}`);
  return search(query);
}

byId("search-form").addEventListener("submit", (event) => { event.preventDefault(); searchFor(byId("query").value); });
for (const button of document.querySelectorAll("button[data-query]")) {
  button.addEventListener("click", () => { byId("search").scrollIntoView(); searchFor(button.dataset.query); });
}

// --- outputs of evaluation items ---

const VERDICTS = { 1: ["right", "✓ right"], 0: ["wrong", "✗ wrong"], p: ["partly", "◐ in part"], "-": ["", "not measured"] };
const outputs = { page: 0, shown: [] };

function outputFilter(signs) {
  const last = signs.at(-1), wanted = byId("output-verdict").value;
  if (wanted === "right") return last === "1";
  if (wanted === "wrong") return last === "0" || last === "p";
  if (wanted === "changed") return new Set([...signs].filter((sign) => sign !== "-")).size > 1;
  if (wanted === "lost") return last !== "1" && signs.slice(0, -1).includes("1");
  return true;
}

async function showOutputs(fresh) {
  const name = byId("output-set").value, status = byId("output-status"), list = byId("items");
  try {
    const set = DATA.outputs.find((each) => each.name === name), index = await part(`outputs/${name}`);
    if (fresh) {
      outputs.page = 0;
      const kind = byId("output-kind");
      const chosen = kind.dataset.set === name ? kind.value : "";
      kind.replaceChildren(make("option", { value: "" }, "all kinds"));
      index.kinds.forEach((each, n) => kind.append(make("option", { value: n }, each)));
      kind.value = chosen;
      kind.dataset.set = name;
      const text = byId("output-text").value.toLowerCase();
      outputs.shown = index.items.map((row, n) => [n, ...row]).filter(([, id, kindNumber, signs]) =>
        (kind.value === "" || kindNumber === Number(kind.value)) && (!text || id.toLowerCase().includes(text)) && outputFilter(signs));
      const files = byId("output-files");
      files.replaceChildren("From: ");
      [...new Set(set.files)].forEach((file, n) => files.append(n ? ", " : "", fileLink(file)));
    }
    const size = 6, from = outputs.page * size, rows = outputs.shown.slice(from, from + size);
    const loaded = await Promise.all(rows.map(([n]) => part(`outputs/${name}-${Math.floor(n / index.per)}`)));
    list.replaceChildren(...rows.map(([n, id, , signs], at) => outputItem(set, id, signs, loaded[at][n % index.per])));
    const end = from + rows.length;
    status.textContent = rows.length ? `${count(from + 1)} to ${count(end)} of ${plural(outputs.shown.length, "item")} (${count(set.items)} in the set)` : "No item matches.";
    byId("output-before").disabled = !outputs.page;
    byId("output-next").disabled = end >= outputs.shown.length;
    document.body.dataset.outputs = `${name} ${outputs.shown.length}`;
  } catch (error) {
    status.textContent = error.message;
  }
}

function outputItem(set, id, signs, [question, expected, answers]) {
  const item = make("article", { class: "item" }, make("h4", {}, foreign(id, "bdi")));
  if (question) item.append(make("div", { class: "text" }, foreign(question)));
  if (expected) item.append(make("p", { class: "meta" }, "expected: ", foreign(expected, "bdi")));
  const grid = make("div", { class: "answers" });
  set.columns.forEach((model, n) => {
    const [kind, words] = VERDICTS[signs[n]];
    const box = make("div", { class: `answer ${kind}` }, make("b", {}, model), " ", make("span", { class: "verdict" }, words));
    if (answers[n]) {
      const [text, note] = answers[n];
      box.append(make("div", { class: "text" }, text === "" ? make("small", {}, "(nothing)") : foreign(text)));
      if (note) box.append(make("p", { class: "meta" }, foreign(note)));
    }
    grid.append(box);
  });
  item.append(grid);
  return item;
}

if (DATA.outputs.length) {
  byId("output-form").addEventListener("submit", (event) => { event.preventDefault(); showOutputs(true); });
  for (const name of ["output-set", "output-kind", "output-verdict"]) byId(name).addEventListener("change", () => showOutputs(true));
  byId("output-before").addEventListener("click", () => { outputs.page--; showOutputs(false); });
  byId("output-next").addEventListener("click", () => { outputs.page++; showOutputs(false); });
  whenNear("outputs", () => showOutputs(true));
}

function whenNear(name, action) {
  const observer = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); action(); }
  }, { rootMargin: "400px" });
  observer.observe(byId(name));
}

// --- contamination, item by item ---

const SIGNS = { c: "contaminated", o: "overlap", "-": "clean", " ": "not searched" };

async function showContamination(number, list) {
  const { phases, items, perPart } = DATA.contamination;
  try {
    const rows = await part(`contamination/items-${number}`);
    for (const [id, kind, split, words, signs, longest, overlap] of rows) {
      const row = make("tr", {}, make("th", { scope: "row" }, foreign(id, "bdi")), make("td", {}, kind), make("td", {}, split), make("td", { class: "number" }, String(words)));
      for (let n = 0; n < phases.length; n++) {
        const sign = signs[n] ?? " ";
        row.append(make("td", { class: sign === "c" ? "failed" : "" }, SIGNS[sign] ?? "?"));
      }
      row.append(make("td", { class: "number" }, String(longest)), make("td", { class: "number" }, String(overlap)));
      list.append(row);
    }
    const shown = Math.min((number + 1) * perPart, items), more = byId("contamination-more");
    byId("contamination-status").textContent = `${count(shown)} of ${plural(items, "item")}, the worst first.`;
    more.hidden = shown >= items;
    more.onclick = () => showContamination(number + 1, list);
  } catch (error) {
    byId("contamination-status").textContent = error.message;
  }
}

if (DATA.contamination.items) {
  byId("contamination-items").addEventListener("toggle", (event) => {
    const list = byId("contamination-rows");
    if (event.target.open && !list.childElementCount) showContamination(0, list);
  });
}

// --- replays by others ---

async function showReplays() {
  const list = byId("replay-rows"), status = byId("replay-status");
  try {
    const rows = await part("replays/record");
    const on = `${DATA.repository}-page`;
    status.textContent = rows.length ? `${plural(rows.length, "certificate")}.`
      : onHub ? "No certificate was sent so far." : `None is in this copy, which was sealed before anybody replayed it; the Space ${on} on the Hub has those that came later.`;
    byId("replay-table").hidden = !rows.length;
    for (const [name, result, phase, first, last, verdict, tensors, differ, environment] of rows) {
      const file = make("a", { href: `replays/${encodeURIComponent(name)}.json` }, name);
      list.append(make("tr", {}, make("th", { scope: "row" }, file), make("td", { class: result === "FAILED" ? "failed" : result === "PASSED" ? "ok" : "" }, result.toLowerCase()),
        make("td", {}, `${phase}, ${count(first)} to ${count(last)}`), make("td", {}, foreign(verdict)),
        make("td", { class: "number" }, `${count(tensors - differ)} of ${count(tensors)}`), make("td", {}, make("code", {}, environment.slice(0, 19)))));
    }
    document.body.dataset.replays = rows.length;
  } catch (error) {
    status.textContent = error.message;
  }
}
showReplays();

// --- lineage ---

const graph = byId("graph");
let allFiles = null;

function upstream(products, nodes) {
  const found = new Set(), left = [...nodes];
  while (left.length) {
    const next = left.pop();
    if (found.has(next) || !Object.hasOwn(products, next)) continue;
    found.add(next);
    left.push(...products[next][4].map(([, input]) => input));
  }
  return found;
}

function artifactButton(node) {
  const button = make("button", { class: "link", type: "button" }, node);
  button.addEventListener("click", () => choose(node));
  return button;
}

async function files() {
  if (!allFiles) {
    const numbers = Array.from({ length: DATA.fileParts }, (_, n) => part(`lineage/files-${n}`));
    allFiles = (await Promise.all(numbers)).flat();
  }
  return allFiles;
}

async function choose(node) { // an artifact, or a box of the graph that stands for several
  const panel = byId("product");
  let products, groups;
  try {
    ({ products, groups } = await part("lineage/products"));
  } catch (error) {
    panel.hidden = false;
    panel.replaceChildren(error.message);
    return;
  }
  const members = Object.hasOwn(groups, node) ? groups[node] : [node];
  if (!Object.hasOwn(products, members[0])) return;
  const found = upstream(products, members);
  const isOn = (box) => (Object.hasOwn(groups, box) ? groups[box] : [box]).some((each) => found.has(each));
  const isChosen = (box) => box === node || (Object.hasOwn(groups, box) && groups[box].includes(node));
  graph.classList.add("dim");
  for (const box of graph.querySelectorAll(".box")) {
    box.classList.toggle("on", isOn(box.dataset.node));
    box.classList.toggle("chosen", isChosen(box.dataset.node));
  }
  for (const edge of graph.querySelectorAll(".edge")) edge.classList.toggle("on", isOn(edge.dataset.to) && isOn(edge.dataset.from));
  const place = graph.querySelector(".box.chosen rect");
  if (place) graph.parentElement.scrollLeft = Number(place.getAttribute("x")) - graph.parentElement.clientWidth / 2;
  panel.hidden = false;
  if (members.length > 1) {
    const choices = make("ul", { class: "text" }, ...members.map((each) => make("li", {}, artifactButton(each))));
    panel.replaceChildren(make("h3", { tabindex: "-1" }, plural(members.length, "artifact")), choices);
    document.body.dataset.product = node;
    return;
  }
  const [stage, key, digest, statement, inputs, seconds, failed] = products[node];
  const list = make("dl");
  const row = (name, ...value) => list.append(make("dt", {}, name), make("dd", {}, ...value));
  row("stage", stage || "not stated");
  row("key", make("code", {}, key));
  row("digest", make("code", {}, digest));
  row("statement", statement ? fileLink(statement) : "none");
  row("manifest", fileLink(`evidence/manifests/${node}.json`));
  row("took", `${count(seconds)} s${failed ? `, after ${plural(failed, "failed attempt")}` : ""}`);
  const sources = inputs.map(([role, input]) => (Object.hasOwn(products, input) ? [`${role}: `, artifactButton(input)] : [`${role}: ${input}`]));
  row("made from", ...(sources.length ? sources.flatMap((each, n) => (n ? [make("br"), ...each] : each)) : ["no other artifact"]));
  row("all before it", `${found.size - 1}`);
  panel.replaceChildren(make("h3", { tabindex: "-1" }, node), list);
  try {
    const here = (await files()).filter(([, origin]) => origin === node);
    const shown = here.slice(0, 40).flatMap(([path], n) => (n ? [make("br"), fileLink(path)] : [fileLink(path)]));
    row("files", ...(shown.length ? shown : ["none is published"]), here.length > 40 ? ` and ${here.length - 40} others` : "");
  } catch (error) {
    row("files", error.message);
  }
  document.body.dataset.product = node;
}

graph.addEventListener("click", (event) => {
  const box = event.target.closest(".box");
  if (!box) return;
  event.preventDefault();
  choose(box.dataset.node);
});

byId("file-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = byId("file").value.trim().toLowerCase(), list = byId("file-rows"), status = byId("file-status");
  try {
    const found = (await files()).filter(([path, , , digest]) => path.toLowerCase().includes(text) || (text.length > 5 && digest?.startsWith(text)));
    status.textContent = `${plural(found.length, "file")}${found.length > 30 ? ", 30 shown" : ""}.`;
    list.replaceChildren(...found.slice(0, 30).map(([path, node, origin, digest]) => {
      const row = make("li", {}, fileLink(path));
      if (node === null) row.append(make("span", { class: "meta" }, ` generated: ${origin}`));
      else {
        const button = make("button", { class: "link", type: "button" }, node);
        button.addEventListener("click", () => { choose(node); byId("product").scrollIntoView({ block: "nearest" }); });
        row.append(" from ", button, ", file ", foreign(origin, "bdi"), make("br"), make("small", {}, `SHA-256 ${digest}`));
      }
      return row;
    }));
  } catch (error) {
    status.textContent = error.message;
  }
});

// --- the address ---

function follow() {
  let hash = location.hash.slice(1);
  try { hash = decodeURIComponent(hash); } catch { return; }
  if (hash.startsWith("q=")) { byId("search").scrollIntoView(); byId("query").value = hash.slice(2); search(hash.slice(2)); }
  else if (hash.startsWith("product=")) { byId("lineage").scrollIntoView(); choose(hash.slice(8)); }
  else if (hash.startsWith("outputs=") && DATA.outputs.some((each) => each.name === hash.slice(8))) {
    byId("output-set").value = hash.slice(8);
    byId("outputs").scrollIntoView();
    showOutputs(true);
  }
}
window.addEventListener("hashchange", follow);
follow();
