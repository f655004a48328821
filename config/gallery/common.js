"use strict";
const facts = JSON.parse(document.getElementById("data").textContent);
const when = time => new Date(time * 1000).toLocaleString([], {dateStyle: "medium", timeStyle: "short"});
const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
const change = (values, digits) => values.map(value => value.toFixed(digits)).join(" → ");

function make(tag, text, parent) {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;
  return element;
}
