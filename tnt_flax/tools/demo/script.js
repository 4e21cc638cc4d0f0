"use strict";
// Sends images to POST /predict, a few at a time, and lists the predictions.

const PARALLEL = 4;
const byId = (id) => document.getElementById(id);
const waiting = [];
let running = 0, listed = 0, failed = 0;

function makeCard(file) {
  const card = byId("image").content.firstElementChild.cloneNode(true);
  const picture = card.querySelector("img");
  card.querySelector("h2").textContent = file.name;
  picture.addEventListener("load", () => URL.revokeObjectURL(picture.src));
  picture.addEventListener("error", () => picture.remove()); // a format that the browser lacks
  picture.src = URL.createObjectURL(file);
  return card;
}

function showFailure(card, message) {
  failed++;
  card.classList.add("failed");
  card.querySelector(".message").textContent = message;
}

function showPredictions(card, {predictions, explorer}) {
  card.querySelector(".message").remove();
  const table = card.querySelector(".predictions");
  listPredictions(table, predictions);
  table.hidden = false;
  const link = card.querySelector(".explore");
  link.href = explorer;
  link.setAttribute("aria-label", `Explore attention of ${card.querySelector("h2").textContent}`);
  link.hidden = false;
}

async function predict(card, file) {
  const megabytes = byId("files").dataset.megabytes;
  if (file.size > megabytes * 2 ** 20) {
    showFailure(card, `The file is larger than ${megabytes} MiB.`);
    return;
  }
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    showFailure(card, "The file cannot be read. Is it a folder?");
    return;
  }
  const form = new FormData();
  form.append("image", file);
  let answer;
  try {
    const response = await fetch("/predict?explorer=1", {method: "POST", body: form});
    answer = await response.json();
  } catch {
    showFailure(card, "The demo does not answer: is it still running?");
    return;
  }
  const image = answer.images?.[0] ?? answer;
  if (image.predictions) showPredictions(card, image);
  else showFailure(card, `Cannot be classified: ${image.error}.`);
}

function showStatus() {
  const left = running + waiting.length;
  byId("status").textContent = left ? `Waiting for ${left} of ${listed} images`
    : `Classified ${listed - failed} of ${listed} images`;
  if (!left) listed = failed = 0;
}

async function work() {
  if (running === PARALLEL || !waiting.length) return;
  running++;
  while (waiting.length) {
    showStatus();
    await predict(...waiting.shift());
  }
  running--;
  showStatus();
}

function add(files) {
  if (!files.length) byId("status").textContent = "There is no image file.";
  const added = [...files].map((file) => [makeCard(file), file]);
  byId("images").prepend(...added.map(([card]) => card));
  listed += added.length;
  waiting.push(...added);
  for (let i = 0; i < PARALLEL; i++) work();
}

// ---------------------------------------------------------------------------------------- input

byId("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});

document.addEventListener("paste", (event) => {
  add(event.clipboardData.files);
});

// Without these handlers, a browser that gets a file opens it instead of the page.
let depth = 0; // of elements that the pointer has entered
document.addEventListener("dragenter", () => {
  depth++;
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", () => {
  depth--;
  if (!depth) document.body.classList.remove("dragging");
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("dragging");
  add(event.dataTransfer.files);
});

byId("address").textContent = `${location.origin}/`;
