"use strict";
/* The overview: the attention of all rows in one small picture. Rows of the report run down, positions run
   across; a pixel is the largest score that falls into it, on a logarithmic scale from 1e-4 to 1. */

const overview = (() => {
  const { meta, rows, positions, rowOfToken } = attention;
  const box = document.getElementById("map");
  const canvas = box.querySelector("canvas");
  const DECADES = 4;
  const level = (value) => (value > 0 ? Math.min(1, Math.max(0, 1 + Math.log10(value) / DECADES)) : 0);

  /* 256 colours between the page's --map-0 (nothing) and --map-4 (1.0), as 32-bit pixels. */
  function palette() {
    const style = getComputedStyle(document.documentElement);
    const stops = [0, 1, 2, 3, 4].map((i) => style.getPropertyValue("--map-" + i).trim().split(" ").map(Number));
    return Uint32Array.from({ length: 256 }, (_, i) => {
      const place = i / 255 * (stops.length - 1);
      const stop = Math.min(Math.floor(place), stops.length - 2);
      const [r, g, b] = stops[stop].map((from, c) => Math.round(from + (stops[stop + 1][c] - from) * (place - stop)));
      return (255 << 24 | b << 16 | g << 8 | r) >>> 0;
    });
  }

  let drawn = null;

  function draw(choice) {
    drawn = choice;
    if (!rows) return;
    const scale = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.min(positions, Math.round(box.clientWidth * scale)));
    const height = Math.max(1, Math.min(rows, Math.round(box.clientHeight * scale)));
    const { start, end, positions: at, scores } = attention.view(choice);
    const largest = new Float32Array(width * height);
    for (let row = 0; row < rows; row++) {
      const line = Math.floor(row * height / rows) * width;
      for (let i = start[row]; i < end[row]; i++) {
        const pixel = line + Math.floor(at[i] * width / positions);
        if (scores[i] > largest[pixel]) largest[pixel] = scores[i];
      }
    }
    const colours = palette();
    const image = new ImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < pixels.length; i++) pixels[i] = colours[Math.round(level(largest[i]) * 255)];
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  const percent = (share) => (100 * share).toFixed(3) + "%";

  function build(select) {
    canvas.setAttribute("aria-label", `Attention of ${rows} rows over ${positions} positions`);
    document.getElementById("map-end").textContent = "position " + (positions - 1);
    const split = document.getElementById("map-prompt");
    split.style.left = percent(meta.promptLength / positions);
    split.hidden = meta.promptLength <= 0 || meta.promptLength >= positions;

    const pick = (event) => {
      const frame = canvas.getBoundingClientRect();
      const row = Math.floor((event.clientY - frame.top) / frame.height * rows);
      if (row >= 0 && row < rows) select(meta.rows[row] + 1);
    };
    canvas.addEventListener("click", pick);
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && event.buttons === 1) pick(event);
    });
    const again = () => { if (drawn !== null) draw(drawn); };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    new ResizeObserver(again).observe(box);
  }

  /* A line where the token's scores are: at its row, or at its column for what looked at it. */
  function mark({ token, direction }) {
    const row = token < 0 ? -1 : rowOfToken[token];
    const [across, down] = [document.getElementById("map-row"), document.getElementById("map-column")];
    across.hidden = row < 0 || direction === "by";
    down.hidden = token < 0 || token >= positions || direction === "to";
    across.style.top = percent((row + 0.5) / rows);
    down.style.left = percent((token + 0.5) / positions);
  }

  return { build, draw, mark };
})();
