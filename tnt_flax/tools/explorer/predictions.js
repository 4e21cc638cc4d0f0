"use strict";
// Lists predictions, in explorers and in the demo.

const percent = (x) => `${(100 * x).toFixed(2)} %`;

function listPredictions(table, predictions) {
  for (const {label, probability} of predictions) {
    const [name, share] = [document.createElement("td"), document.createElement("td")];
    name.textContent = label;
    const bar = document.createElement("div");
    bar.className = "bar";
    const length = document.createElement("i");
    length.style.width = `${70 * probability}%`;
    bar.append(length, percent(probability));
    share.append(bar);
    table.insertRow().append(name, share);
  }
}
