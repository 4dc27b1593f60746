"use strict";
/* The panel beside the text: what is known of the token shown. Its nodes are made once and refilled. */

const panel = (() => {
  const { MEAN, meta, positions, rowOfToken } = attention;
  const { element, quoted, score } = words;
  const $ = (id) => document.getElementById(id);
  const percentWide = (share) => (100 * share).toFixed(1) + "% 100%";
  const items = [];
  const bars = [];
  const masses = [];
  const spanBars = [];

  function build() {
    for (let i = 0; i < Math.max(32, meta.k); i++) items.push(buildItem(i));
    meta.bins.forEach(buildBin);
    for (const name of meta.spans) {
      const line = element("div");
      const [bar, number] = [element("i"), element("b")];
      line.append(element("span", "", name), bar, number);
      $("spans").append(line);
      spanBars.push({ bar, number });
    }
  }

  function buildItem(i) {
    const [line, button] = [element("li"), element("button", "item")];
    const parts = ["text", "position", "distance", "score"].map((name) => element("span", name));
    button.type = "button";
    button.index = i;
    button.append(...parts);
    line.hidden = true;
    line.append(button);
    $("items").append(line);
    const [text, position, distance, value] = parts;
    return { line, button, text, position, distance, value };
  }

  function buildBin(bin, i) {
    const column = element("div", "column " + bin.mass);
    const [value, bar] = [element("span", "value"), element("i")];
    column.append(value, bar, element("span", "label", bin.label));
    $("histogram").append(column);
    bars.push({ bar, value });
    let group = masses.at(-1);
    if (!group || group.name !== bin.mass) {
      const [node, number] = [element("div", "mass " + bin.mass), element("b")];
      node.append(bin.mass + " ", number);
      $("histogram").append(node);
      group = { name: bin.mass, first: i, node, number };
      masses.push(group);
    }
    group.node.style.gridColumn = `${group.first + 1} / ${i + 2}`;
  }

  /* `shown` is what the page highlights: tokens, scores and distances, best first, the hidden sinks apart;
     null where the row was not captured. */
  function show(state, shown) {
    document.body.classList.toggle("empty", state.token < 0);
    $("unpin").hidden = !state.pinned;
    if (state.token < 0) {
      $("token").textContent = "";
      $("where").textContent = attention.rows ? "Point at a token or tap it." : "This report holds no record.";
    } else showCard(state);
    showList(state, shown);
  }

  function showCard({ token, choice }) {
    const row = rowOfToken[token];
    const captured = row >= 0;
    document.body.classList.toggle("missing", !captured);
    $("token").textContent = words.token(token);
    $("where").textContent = token >= positions ? "after the text"
      : `position ${token} · ${token < meta.promptLength ? "prompt" : `answer token ${token - meta.promptLength}`}`;
    $("missing").hidden = captured;
    if (!captured) {
      $("missing").textContent = token === 0
        ? "Not captured: no row precedes the first token."
        : `Not captured: no record of the row at position ${token - 1}, which ` +
          (token < meta.promptLength ? "precedes this prompt token." : "chose this token.");
      return;
    }
    const zone = meta.legend[meta.zones[row]];
    const [dot, name, sure, meaning] = $("zone").children;
    dot.style.setProperty("--zone", zone.colour);
    name.textContent = zone.name;
    sure.textContent = meta.confidence[row].toFixed(2);
    meaning.textContent = zone.meaning;

    const { start, end, scores } = attention.view(choice);
    let mass = 0;
    for (let i = start[row]; i < end[row]; i++) mass += scores[i];
    const numbers = attention.fingerprint(choice, row);
    $("mass-name").textContent = choice === MEAN ? "reported mass" : `top-${meta.k} mass`;
    $("mass").textContent = mass.toFixed(4);
    $("entropy").textContent = numbers[meta.fingerprint.entropy].toFixed(3);
    $("phase").textContent = meta.prompt[row] ? "" : meta.think[row] ? "thinking" : "output";
    showDistances(numbers, token);
    attention.spans(choice, row).forEach((value, i) => {
      spanBars[i].bar.style.backgroundSize = percentWide(value);
      spanBars[i].number.textContent = score(value);
    });
  }

  function showDistances(numbers, token) {
    const first = meta.fingerprint.histogram;
    const histogram = numbers.subarray(first, first + meta.bins.length);
    const largest = Math.max(...histogram) || 1;
    bars.forEach(({ bar, value }, i) => {
      bar.style.transform = `scaleY(${(histogram[i] / largest).toFixed(3)})`;
      value.textContent = histogram[i] >= 0.005 ? words.fraction(histogram[i], 2) : "";
    });
    for (const { name, number } of masses) number.textContent = words.fraction(numbers[meta.masses[name]], 3);
    $("histogram").setAttribute("aria-label", `Attention of the row at position ${token - 1} by distance: ` +
      meta.bins.map((bin, i) => `${bin.label}: ${histogram[i].toFixed(3)}`).join(", "));
  }

  function showList({ token, direction }, shown) {
    const { tokens, scores, distances, hidden } = shown || { tokens: [], scores: [], distances: [], hidden: [] };
    const to = direction === "to";
    const largest = tokens.length ? scores[0] : 0;
    $("list-name").textContent = token < 0 ? "" : to ? "Attends to" : `Attended by ${tokens.length.toLocaleString("en")}`;
    $("scale").hidden = largest === 0;
    $("scale-max").textContent = score(largest);
    items.forEach((item, i) => {
      if (item.line.hidden !== i >= tokens.length) item.line.hidden = i >= tokens.length;
      if (i >= tokens.length) return;
      item.text.textContent = words.token(tokens[i]);
      item.position.textContent = tokens[i];
      item.distance.textContent = distances[i];
      item.value.textContent = score(scores[i]);
      item.button.style.backgroundSize = percentWide(scores[i] / largest);
    });
    const notes = hidden.map(([sink, value]) => `sink hidden: ${quoted(sink)} at ${sink}, ${score(value)}`);
    if (tokens.length > items.length) notes.push(`${tokens.length - items.length} lower ones not listed`);
    if (shown && !tokens.length && !hidden.length) {
      notes.push(to ? "this row reports no positions" : "no captured row reports this token");
    }
    $("note").textContent = notes.join(" · ");
  }

  /* Mark the list's line of one token, -1 for none, and say its score. */
  let ringed = null;

  function ring(token, { direction }, shown) {
    if (ringed) ringed.classList.remove("ring");
    ringed = null;
    $("probe").textContent = "";
    if (token < 0 || !shown) return;
    const i = shown.tokens.indexOf(token);
    if (i >= 0 && i < items.length) {
      ringed = items[i].button;
      ringed.classList.add("ring");
    }
    const value = i >= 0 ? score(shown.scores[i]) : direction === "to" ? "not reported" : "does not report this token";
    $("probe").textContent = `${quoted(token)} at ${token}: ${value}`;
  }

  return { build, show, ring };
})();
