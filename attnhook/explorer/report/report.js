"use strict";
/* The page: one state, one show(). Tokens are built once; showing another token restyles only those that are,
   or were, highlighted. */

(() => {
  const { MEAN, meta, rows, positions, tokens, rowOfToken } = attention;
  const { element, quoted, percent } = words;
  const $ = (id) => document.getElementById(id);
  const text = $("text");
  const cells = []; // the element of each token
  const state = {
    token: -1, // the token shown, -1 for none
    pinned: false,
    direction: "to", // "to": what the token looked at; "by": what looked at the token
    choice: meta.layers.length - 1, // index of a captured layer, or MEAN
    hideSink: false,
  };

  // ---- building the text, the zones and the layer choice

  function buildText() {
    const part = (name, from, to) => {
      const [section, body] = [element("section", name), element("div", "body")];
      const count = Math.min(to, positions) - from;
      section.setAttribute("role", "group");
      section.setAttribute("aria-label", name);
      let line = null; // a block for each line of text: the browser skips those that are out of sight
      for (let token = from; token < to; token++) {
        if (!line) body.append(line = element("div", "line"));
        line.append(buildCell(token));
        if (meta.tokens[token]?.endsWith("\n")) line = null;
      }
      section.append(element("h2", "", `${name} · ${count.toLocaleString("en")} tokens`), body);
      text.append(section);
    };
    if (meta.promptLength) part("prompt", 0, meta.promptLength);
    if (tokens > meta.promptLength) part("answer", meta.promptLength, tokens);
  }

  function buildCell(token) {
    const after = token >= positions;
    const span = element("span", "t", after ? "■" : words.visible(meta.tokens[token], false));
    span.id = "t" + token;
    span.index = token;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    if (after) span.title = "the token chosen after the last one shown, most often the end of the turn";
    if (after || words.blank(meta.tokens[token])) span.classList.add("blank");
    const row = rowOfToken[token];
    if (row >= 0) {
      span.classList.add("zoned");
      span.style.setProperty("--zone", meta.legend[meta.zones[row]].colour);
      span.style.setProperty("--sure", (30 + 70 * meta.confidence[row]).toFixed(0) + "%");
    }
    cells.push(span);
    return span;
  }

  function buildZones() {
    const generated = meta.prompt.filter((prompt) => !prompt).length;
    const counted = generated || rows;
    const counts = meta.legend.map(() => 0);
    meta.zones.forEach((zone, row) => { if (!generated || !meta.prompt[row]) counts[zone]++; });
    $("zones").hidden = counted === 0;
    const shares = meta.legend.map((zone, i) => `${zone.name} ${percent(counts[i] / counted)}`);
    const title = `Zones of the ${counted.toLocaleString("en")} ${generated ? "answer" : "prompt"} tokens`;
    $("shares").setAttribute("aria-label", `${title}: ${shares.join(", ")}`);
    $("shares").title = title;
    meta.legend.forEach((zone, i) => {
      const [bar, button, name] = [element("i"), element("button"), element("dt", "", zone.name)];
      for (const node of [bar, button, name]) node.style.setProperty("--zone", zone.colour);
      bar.style.flexGrow = counts[i] / counted;
      bar.hidden = counts[i] === 0;
      button.type = "button";
      button.title = zone.meaning;
      button.setAttribute("aria-pressed", "false");
      button.classList.toggle("none", counts[i] === 0);
      button.append(element("i"), zone.name, element("small", "", percent(counts[i] / counted)));
      button.addEventListener("click", () => showOnlyZone(i));
      $("shares").append(bar);
      $("legend").append(button);
      $("meanings").append(name, element("dd", "", zone.meaning));
    });
  }

  let zoneShown = -1;

  function showOnlyZone(zone) {
    zoneShown = zoneShown === zone ? -1 : zone;
    [...$("legend").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === zoneShown)));
    cells.forEach((span, token) => {
      span.classList.toggle("dim", zoneShown >= 0 && meta.zones[rowOfToken[token]] !== zoneShown);
    });
  }

  function buildLayers() {
    const count = meta.layers.length;
    const option = (choice, label) => {
      const made = element("option", "", label);
      made.value = choice;
      $("layer").append(made);
    };
    if (count > 1) option(MEAN, `mean of ${count} layers`);
    meta.layers.forEach((layer, choice) => option(choice, "layer " + layer));
    $("layer").disabled = count < 2;
    $("layer-slider").hidden = count < 3;
    $("layer-slider").max = count - 1;
    document.body.classList.toggle("no-records", count === 0);
  }

  // ---- showing the state

  let lit = []; // tokens highlighted now
  let at = -1; // the token marked as shown
  let shown = null; // what the panel lists: null where nothing was captured

  function show() {
    const { token, direction, pinned } = state;
    for (const other of lit) cells[other].classList.remove("lit");
    lit = [];
    if (at >= 0) {
      cells[at].classList.remove("at", "pinned");
      cells[at].setAttribute("aria-selected", "false");
    }
    at = token;
    if (at >= 0) {
      cells[at].classList.add("at");
      cells[at].classList.toggle("pinned", pinned);
      cells[at].setAttribute("aria-selected", String(pinned));
    }
    if (document.body.dataset.direction !== direction) document.body.dataset.direction = direction;
    shown = token < 0 ? null : withoutSinks(attention.entries(state.choice, direction, token));
    if (shown) highlight(shown);
    ring(-1);
    panel.show(state, shown);
    overview.mark(state);
  }

  function withoutSinks(entries) {
    if (!entries) return null;
    entries.hidden = [];
    if (!state.hideSink || state.direction !== "to") return entries;
    const sinks = attention.sinks(state.choice).positions;
    const kept = { tokens: [], scores: [], distances: [], hidden: [] };
    entries.tokens.forEach((token, i) => {
      if (sinks.has(token)) kept.hidden.push([token, entries.scores[i]]);
      else for (const name of ["tokens", "scores", "distances"]) kept[name].push(entries[name][i]);
    });
    return kept;
  }

  function highlight({ tokens, scores }) {
    for (let i = 0; i < tokens.length && scores[i] > 0; i++) {
      const strength = Math.sqrt(scores[i] / scores[0]);
      if (strength < 0.03) break; // too faint to see
      cells[tokens[i]].style.setProperty("--a", strength.toFixed(2));
      cells[tokens[i]].classList.add("lit");
      lit.push(tokens[i]);
    }
  }

  let ringed = -1;

  function ring(token) {
    if (ringed >= 0) cells[ringed].classList.remove("ring");
    ringed = token;
    if (token >= 0) cells[token].classList.add("ring");
    panel.ring(token, state, shown);
  }

  // ---- changing the state

  let frame = 0;

  function change(values) {
    Object.assign(state, values);
    remember();
    if (!frame) frame = requestAnimationFrame(() => { frame = 0; show(); });
  }

  function pin(token) {
    change({ token, pinned: true });
    text.setAttribute("aria-activedescendant", cells[token].id);
    reveal(token, 5);
    const row = rowOfToken[token];
    const entries = attention.entries(state.choice, state.direction, token);
    const most = entries ? entries.tokens.slice(0, 3).map((o, i) => `${quoted(o)} ${entries.scores[i].toFixed(2)}`) : [];
    $("status").textContent = `${quoted(token)}, position ${token}, ` +
      (row < 0 ? "not captured. " : meta.legend[meta.zones[row]].name + ". ") + most.join(", ");
  }

  /* Lines out of sight have an estimated height until they come near: look again once they have their own. */
  function reveal(token, times) {
    cells[token].scrollIntoView({ block: "nearest" });
    const again = () => { if (state.pinned && state.token === token) reveal(token, times - 1); };
    if (times > 0) requestAnimationFrame(again);
  }

  function unpin() {
    text.removeAttribute("aria-activedescendant");
    change({ pinned: false });
  }

  function setDirection(direction) {
    $("mode-to").setAttribute("aria-pressed", String(direction === "to"));
    $("mode-by").setAttribute("aria-pressed", String(direction === "by"));
    $("hide-sink").disabled = direction === "by"; // a sink is a place that is looked at
    change({ direction });
  }

  function setSink(hideSink) {
    $("hide-sink").checked = hideSink;
    change({ hideSink });
  }

  function setLayer(choice) {
    if (!meta.layers.length) return;
    $("layer").value = choice;
    $("layer-slider").classList.toggle("unused", choice === MEAN);
    if (choice !== MEAN) $("layer-slider").value = choice;
    const sinks = attention.sinks(choice);
    const named = [...sinks.positions].map((token) => `${quoted(token)} at ${token}`);
    $("sink-fact").textContent = named.length
      ? `${named[0]}${named.length > 1 ? ` and ${named.length - 1} more` : ""} · ${percent(sinks.share)}`
      : "none stands out in this layer";
    $("sink-fact").title = named.length ? `${named.join(", ")}: ${percent(sinks.share)} of all reported mass` : "";
    $("overview-note").textContent = `${$("layer").selectedOptions[0].textContent} · score on a log scale, 1e-4 to 1`;
    overview.draw(choice);
    change({ choice });
  }

  // ---- the address is a link to what is shown

  let ready = false;

  function remember() {
    if (!ready) return;
    const hash = new URLSearchParams();
    if (state.pinned) hash.set("token", state.token);
    if (meta.layers.length) hash.set("layer", state.choice === MEAN ? "mean" : meta.layers[state.choice]);
    if (state.direction === "by") hash.set("direction", "by");
    if (state.hideSink) hash.set("sink", "hidden");
    if (location.hash === "#" + hash) return;
    try {
      history.replaceState(null, "", "#" + hash);
    } catch { /* a page in a sandboxed frame has no history of its own */ }
  }

  function recall() {
    const hash = new URLSearchParams(location.hash.slice(1));
    const layer = meta.layers.findIndex((known) => String(known) === hash.get("layer"));
    const token = Number(hash.get("token") ?? -1);
    const first = meta.prompt.indexOf(0);
    setLayer(hash.get("layer") === "mean" && meta.layers.length > 1 ? MEAN : layer < 0 ? meta.layers.length - 1 : layer);
    setDirection(hash.get("direction") === "by" ? "by" : "to");
    setSink(hash.get("sink") === "hidden");
    if (Number.isInteger(token) && token >= 0 && token < tokens) pin(token);
    else if (rows) change({ token: meta.rows[Math.max(first, 0)] + 1 });
    ready = true;
    show();
  }

  // ---- input

  const tokenAt = (event) => event.target.closest?.(".t")?.index ?? -1;
  const itemAt = (event) => {
    const i = event.target.closest?.("#items button")?.index;
    return i === undefined || !shown ? -1 : shown.tokens[i];
  };

  function move(key) {
    const from = state.token < 0 ? meta.promptLength : state.token;
    if (!state.pinned) return pin(Math.min(from, tokens - 1));
    if (key === "ArrowLeft") pin(Math.max(0, from - 1));
    else if (key === "ArrowRight") pin(Math.min(tokens - 1, from + 1));
    else if (key === "Home") pin(0);
    else if (key === "End") pin(tokens - 1);
    else pin(onNextLine(from, key === "ArrowUp" ? -1 : 1));
  }

  /* The token on the line above or below that is nearest to where this one starts. */
  function onNextLine(from, step) {
    const place = (token) => cells[token].getClientRects()[0];
    const here = place(from);
    let best = from;
    let line = null;
    for (let token = from + step; token >= 0 && token < tokens; token += step) {
      const there = place(token);
      if (Math.abs(there.top - here.top) < 4) continue;
      if (line !== null && Math.abs(there.top - line) > 4) break;
      if (line === null || Math.abs(there.left - here.left) < Math.abs(place(best).left - here.left)) best = token;
      line = there.top;
    }
    return best;
  }

  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !tokens) return;
    const control = event.target.closest?.("select, input"); // they use arrows and letters themselves
    const moves = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key);
    const inText = event.target === text;
    if (event.key === "Escape") unpin();
    else if (moves && !control && (state.pinned || inText)) move(event.key);
    else if (inText && (event.key === "Enter" || event.key === " ") && state.token >= 0) {
      if (state.pinned) unpin();
      else pin(state.token);
    } else if (control && control.tagName === "SELECT") return;
    else if (event.key === "b") setDirection(state.direction === "to" ? "by" : "to");
    else if (event.key === "s") setSink(!state.hideSink);
    else if (event.key === "[") setLayer(Math.max(0, state.choice - 1));
    else if (event.key === "]") setLayer(Math.min(meta.layers.length - 1, state.choice + 1));
    else return;
    event.preventDefault();
  }

  function listen() {
    text.addEventListener("pointerover", (event) => {
      const token = tokenAt(event);
      if (event.pointerType === "touch" || token < 0) return;
      if (state.pinned) ring(token === state.token ? -1 : token);
      else if (token !== state.token) change({ token });
    });
    text.addEventListener("pointerleave", () => ring(-1));
    text.addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (token < 0 || getSelection().toString()) return;
      if (state.pinned && token === state.token) unpin();
      else pin(token);
    });
    $("items").addEventListener("pointerover", (event) => ring(itemAt(event)));
    $("items").addEventListener("pointerleave", () => ring(-1));
    $("items").addEventListener("click", (event) => {
      const token = itemAt(event);
      if (token >= 0) pin(token);
    });
    $("mode-to").addEventListener("click", () => setDirection("to"));
    $("mode-by").addEventListener("click", () => setDirection("by"));
    $("hide-sink").addEventListener("change", (event) => setSink(event.target.checked));
    $("layer").addEventListener("change", (event) => setLayer(Number(event.target.value)));
    $("layer-slider").addEventListener("input", (event) => setLayer(Number(event.target.value)));
    $("unpin").addEventListener("click", unpin);
    document.addEventListener("keydown", onKey);
    addEventListener("hashchange", recall);
  }

  buildText();
  buildZones();
  buildLayers();
  panel.build();
  overview.build(pin);
  listen();
  recall();
})();
