"use strict";
/* How the page writes tokens and numbers. */

const words = (() => {
  const { tokens: texts } = attention.meta;

  /* Control, bidirectional and other invisible characters would hide themselves or disturb their neighbours. */
  const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
  const NAMED = { "\n": "↵\n", "\t": "⇥\t", "\r": "␍" };

  function visible(text, oneLine) {
    if (text === "") return "∅";
    const spaced = blank(text) ? text.replace(/ /g, "·") : text;
    return spaced.replace(INVISIBLE, (character) => {
      const named = NAMED[character];
      if (named) return oneLine ? named[0] : named;
      const code = character.charCodeAt(0);
      if (code < 32) return String.fromCharCode(0x2400 + code);
      return "⟨" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩";
    });
  }

  const blank = (text) => !/\S/.test(text);
  const token = (index) => (index < texts.length ? visible(texts[index], true) : "■");
  const quoted = (index) => (index < texts.length ? `“${token(index)}”` : "the token after the text");
  const percent = (value) => (value > 0 && value < 0.01 ? "<1%" : Math.round(value * 100) + "%");
  const fraction = (value, digits) => value.toFixed(digits).replace(/^0\./, ".");
  const score = (value) => (value >= 0.00095 || value === 0 ? value.toFixed(4) : value.toExponential(1));

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  return { visible, blank, token, quoted, percent, fraction, score, element };
})();
