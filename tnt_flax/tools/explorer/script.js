// Draws attention over images. Attention weights are code * scale, see tools/explore.py. Follows
// predictions.js in the same script.

const data = JSON.parse(document.getElementById("data").textContent);
const ROLLOUT = "rollout";
const MEAN = "mean";
const PLAY_MS = 700; // per block
const byId = (id) => document.getElementById(id);
const controls = {
  block: byId("block"), query: byId("query"), head: byId("head"), innerHead: byId("inner-head"),
};

// ------------------------------------------------------------------------------ stored attention

function decode(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// Gives every block of an image its parts of the two arrays, in the order of `encode_attention`.
function placeBlocks(image) {
  image.codes = decode(image.codes);
  image.scales = new Float32Array(decode(image.scales).buffer);
  let code = 0, scale = 0;
  for (const block of image.blocks) {
    const sentences = block.grid[0] * block.grid[1];
    block.outerCode = code;
    block.outerScale = scale;
    code += block.heads * block.queries * block.keys;
    scale += block.heads * block.queries;
    block.innerCode = code;
    block.innerScale = scale;
    code += sentences * block.inner_heads * block.words ** 2;
    scale += sentences * block.inner_heads;
  }
}

const currentBlock = (image) => image.blocks[controls.block.value - 1];
const sentenceSide = (image, block) => image.size[0] / image.blocks[0].grid[0] * block.side; // pixels
const wordsPerSide = (block) => Math.round(Math.sqrt(block.words));
const rowAndColumn = (index, columns) => [Math.floor(index / columns), index % columns];
const range = (n) => Array.from({length: n}, (_, i) => i);
const headsOf = (choice, count) => (choice in range(count) ? [Number(choice)] : range(count));

// Adds `factor` times the attention of one query to `out`, averaged over `heads`.
function addOuter(out, image, block, heads, query, factor) {
  for (const head of heads) {
    const row = head * block.queries + query;
    const scale = image.scales[block.outerScale + row] * factor / heads.length;
    const start = block.outerCode + row * block.keys;
    for (let key = 0; key < block.keys; key++) out[key] += image.codes[start + key] * scale;
  }
}

// Returns the attention of tokens, weighted by `tokens` (token -> weight), to the block's keys.
function outerAttention(image, block, choice, tokens) {
  const out = new Float64Array(block.keys);
  const heads = headsOf(choice, block.heads);
  for (const [token, weight] of tokens) addOuter(out, image, block, heads, token, weight);
  return out;
}

// Returns the attention of a word of a sentence to the words of the sentence.
function innerAttention(image, block, choice, sentence, word) {
  const out = new Float64Array(block.words);
  const heads = headsOf(choice, block.inner_heads);
  for (const head of heads) {
    const matrix = sentence * block.inner_heads + head;
    const scale = image.scales[block.innerScale + matrix] / heads.length;
    const start = block.innerCode + (matrix * block.words + word) * block.words;
    for (let key = 0; key < block.words; key++) out[key] += image.codes[start + key] * scale;
  }
  return out;
}

const first = () => (data.class_token ? 1 : 0); // token of the first sentence
const keyGrid = (block) => block.grid.map((n) => Math.floor(n / block.reduction));

// Returns the tokens whose attention is shown, with weights: one sentence, or the head's input.
function queryTokens(block, sentence) {
  if (sentence !== null) return [[first() + sentence, 1]];
  if (data.class_token) return [[0, 1]];
  return range(block.queries).map((token) => [token, 1 / block.queries]);
}

// Spreads the weight of each cell of a grid evenly over the cells of a finer grid that it averages.
function spread(weights, grid, side, finer) {
  const out = new Float64Array(finer[0] * finer[1]);
  for (let row = 0; row < grid[0]; row++) {
    for (let column = 0; column < grid[1]; column++) {
      const rows = range(side).map((i) => row * side + i).filter((i) => i < finer[0]);
      const columns = range(side).map((i) => column * side + i).filter((i) => i < finer[1]);
      const share = weights[row * grid[1] + column] / (rows.length * columns.length);
      for (const i of rows) for (const j of columns) out[i * finer[1] + j] += share;
    }
  }
  return out;
}

// Returns the share of each sentence of the first block in tokens after block `last`: attention
// rollout (Abnar and Zuidema, 2020), as `tools.attention.rollout`, from the last block backwards.
function rollout(image, last, tokens) {
  let weights = new Float64Array(image.blocks[last].queries);
  for (const [token, weight] of tokens) weights[token] = weight;
  for (let i = last; i >= 0; i--) {
    const block = image.blocks[i];
    const used = [...weights.entries()].filter(([, weight]) => weight);
    let attended = outerAttention(image, block, MEAN, used);
    if (block.reduction > 1) {
      attended = spread(attended, keyGrid(block), block.reduction, block.grid);
    }
    weights = weights.map((weight, token) => (weight + attended[token]) / 2);
    const before = image.blocks[i - 1];
    if (before && before.side !== block.side) {
      weights = spread(weights, block.grid, 2, before.grid);
    }
  }
  return weights;
}

// Returns {weights, grid, cell}: what a query attends to, on a grid of cells of `cell` pixels.
function attentionMap(view, index, choice) {
  const {image} = view;
  const block = image.blocks[index];
  const sentence = controls.query.value === "sentence" ? sentenceOf(view, block) : null;
  const tokens = queryTokens(block, sentence);
  if (choice === ROLLOUT) {
    const weights = rollout(image, index, tokens);
    const {grid} = image.blocks[0];
    const cell = sentenceSide(image, image.blocks[0]);
    return {weights: weights.slice(first()), grid, cell, total: weights.length};
  }
  const weights = outerAttention(image, block, choice, tokens);
  return {
    weights: weights.slice(first()),
    grid: keyGrid(block),
    cell: sentenceSide(image, block) * block.reduction,
    total: weights.length,
  };
}

// Returns the sentence of a block at the view's position, which is in pixels.
function sentenceOf(view, block) {
  return cellOf(view.position, {cell: sentenceSide(view.image, block), grid: block.grid});
}

// Returns the cell of a map at a position in pixels.
function cellOf(position, {cell, grid}) {
  const [row, column] = position.map((x, axis) => Math.min(Math.floor(x / cell), grid[axis] - 1));
  return row * grid[1] + column;
}

// -------------------------------------------------------------------------------------- drawing

// Returns the context of a canvas that shows `pixels` (height, width), at the screen's resolution.
function prepare(canvas, [height, width]) {
  const ratio = Math.max(1, (canvas.clientWidth || width) * (devicePixelRatio || 1) / width);
  const sides = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== sides[0] || canvas.height !== sides[1]) [canvas.width, canvas.height] = sides;
  const context = canvas.getContext("2d");
  context.setTransform(sides[0] / width, 0, 0, sides[1] / height, 0, 0);
  context.imageSmoothingEnabled = canvas.clientWidth < 4 * width;
  return context;
}

// Veils each cell of a grid the more, the less weight it has. Black would look like a black image.
const VEIL = (opacity) => `rgba(68, 84, 120, ${opacity})`;

function veil(context, weights, [rows, columns], cell, [height, width]) {
  const largest = weights.reduce((a, b) => Math.max(a, b), 1e-30);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const share = weights[row * columns + column] / largest;
      context.fillStyle = VEIL(0.85 * (1 - share));
      context.fillRect(column * cell, row * cell, cell, cell);
    }
  }
  context.fillStyle = VEIL(0.85); // cells beyond the last whole average
  context.fillRect(columns * cell, 0, width, height);
  context.fillRect(0, rows * cell, columns * cell, height);
}

function drawMap(context, {picture, image}, map) {
  context.drawImage(picture, 0, 0, image.size[1], image.size[0]);
  veil(context, map.weights, map.grid, map.cell, image.size);
}

function drawGrid(context, [rows, columns], cell) {
  const line = context.getTransform().a;
  context.strokeStyle = "rgba(160, 160, 160, 0.35)";
  context.lineWidth = 1 / line;
  context.beginPath();
  for (let row = 1; row < rows; row++) {
    context.moveTo(0, row * cell);
    context.lineTo(columns * cell, row * cell);
  }
  for (let column = 1; column < columns; column++) {
    context.moveTo(column * cell, 0);
    context.lineTo(column * cell, rows * cell);
  }
  context.stroke();
}

function outline(context, row, column, cell, dashed) {
  const line = context.getTransform().a;
  for (const [color, width] of [["#000", 4], ["#ffd23f", 2]]) {
    context.strokeStyle = color;
    context.lineWidth = width / line;
    context.setLineDash(dashed && width === 2 ? [4 / line, 3 / line] : []);
    context.strokeRect(column * cell, row * cell, cell, cell);
  }
  context.setLineDash([]);
}

const place = (index, columns) => {
  const [row, column] = rowAndColumn(index, columns);
  return `row ${row + 1}, column ${column + 1}`;
};
const indexOfLargest = (weights) => weights.indexOf(Math.max(...weights));
const headName = (choice) => (choice === MEAN ? "mean of the heads" : `head ${Number(choice) + 1}`);

function drawSentences(view) {
  const {image} = view;
  const index = controls.block.value - 1;
  const block = image.blocks[index];
  const choice = controls.head.value;
  const map = attentionMap(view, index, choice);
  const context = prepare(view.sentences, image.size);
  drawMap(context, view, map);
  const cell = sentenceSide(image, block);
  drawGrid(context, block.grid, cell);
  const sentence = sentenceOf(view, block);
  const [row, column] = rowAndColumn(sentence, block.grid[1]);
  outline(context, row, column, cell, !view.kept);

  const own = controls.query.value === "sentence";
  const subject = own ? `the sentence in ${place(sentence, block.grid[1])}` : data.readout;
  const target = own ? indexOfLargest(map.weights) : cellOf(view.position, map);
  const weight = map.weights[target];
  const kind = choice === ROLLOUT || block.reduction === 1 ? "sentence" : "average";
  const object = `the ${kind} in ${place(target, map.grid[1])}`;
  const others = `${map.weights.length} ${kind}s${data.class_token ? " and the class token" : ""}`;
  const share = `An equal share among ${others} is ${percent(1 / map.total)} `
    + `(block ${index + 1}, ${headName(choice)}).`;
  let text;
  if (choice === ROLLOUT) {
    text = `By rollout, ${percent(weight)} of ${subject} after block ${index + 1} comes from ${object}.`;
  } else if (own) {
    text = `${capital(subject)} attends most to ${object}: ${percent(weight)}. ${share}`;
  } else {
    text = `${capital(subject)} gives ${percent(weight)} of its attention to ${object}. ${share}`;
  }
  view.reading.dataset.weight = weight;
  view.reading.textContent = text;
  view.sentences.setAttribute("aria-label", view.reading.textContent);
}

function drawWords(view) {
  const {image} = view;
  const index = controls.block.value - 1;
  const block = image.blocks[index];
  const cell = sentenceSide(image, block);
  const sentence = sentenceOf(view, block);
  const [row, column] = rowAndColumn(sentence, block.grid[1]);
  const context = prepare(view.words, [cell, cell]);
  context.imageSmoothingEnabled = false;
  context.drawImage(
    view.picture, column * cell, row * cell, cell, cell, 0, 0, cell, cell);
  view.wordReading.textContent = "";
  delete view.wordReading.dataset.weight;
  view.wordsCaption.textContent = `Words of the sentence in ${place(sentence, block.grid[1])}.`;
  if (!block.words) {
    view.wordsCaption.textContent += ` Block ${index + 1} does not read words.`;
    return;
  }
  const side = wordsPerSide(block);
  if (view.word !== null) {
    const word = Math.min(view.word, block.words - 1);
    const weights = innerAttention(image, block, controls.innerHead.value, sentence, word);
    veil(context, weights, [side, side], cell / side, [cell, cell]);
    drawGrid(context, [side, side], cell / side);
    outline(context, ...rowAndColumn(word, side), cell / side, false);
    const best = indexOfLargest(weights);
    view.wordReading.dataset.weight = weights[best];
    view.wordReading.textContent = `The word in ${place(word, side)} attends most to the word in `
      + `${place(best, side)}: ${percent(weights[best])}. An equal share among ${block.words} words is `
      + `${percent(1 / block.words)} `
      + `(block ${index + 1}, ${headName(controls.innerHead.value)}).`;
  } else {
    drawGrid(context, [side, side], cell / side);
    view.wordsCaption.textContent += " Point at a word.";
  }
  view.words.setAttribute("aria-label", view.wordReading.textContent || view.wordsCaption.textContent);
}

function drawStrip(view) {
  const choice = controls.head.value === ROLLOUT ? ROLLOUT : MEAN;
  view.strip.querySelectorAll("button").forEach((button, index) => {
    const map = attentionMap(view, index, choice);
    const context = prepare(button.firstChild, view.image.size);
    drawMap(context, view, map);
    button.setAttribute("aria-pressed", index === controls.block.value - 1);
  });
}

function drawImageViews(view) {
  drawSentences(view);
  drawWords(view);
}

function drawAll() {
  byId("block-name").textContent = `${controls.block.value} of ${controls.block.max}`;
  fillHeads();
  for (const view of views) {
    drawImageViews(view);
    drawStrip(view);
  }
}

// ------------------------------------------------------------------------------------- controls

const capital = (text) => text[0].toUpperCase() + text.slice(1);

function setOptions(select, options) {
  const key = options.map(([value]) => value).join();
  if (select.dataset.key === key) return;
  const chosen = select.value;
  select.dataset.key = key;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  select.value = options.some(([value]) => value === chosen) ? chosen : MEAN;
}

// Lists the heads of the current block; PyramidTNT has more in later blocks.
function fillHeads() {
  const block = currentBlock(data.images[0]);
  const heads = (count) => (data.mean_of_heads ? [] : range(count).map((i) => [`${i}`, `${i + 1}`]));
  setOptions(controls.head, [[MEAN, "mean"], [ROLLOUT, "rollout"], ...heads(block.heads)]);
  setOptions(controls.innerHead, [[MEAN, "mean"], ...heads(block.inner_heads)]);
  controls.innerHead.disabled = !block.words;
}

// Returns the position of a pointer in `pixels` (height, width) of a canvas.
function pointed(event, [height, width]) {
  const box = event.currentTarget.getBoundingClientRect();
  const clamp = (x) => Math.min(Math.max(x, 0), 0.999999);
  return [
    clamp((event.clientY - box.top) / box.height) * height,
    clamp((event.clientX - box.left) / box.width) * width,
  ];
}

const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};

function moveSentence(view, position) {
  const block = currentBlock(view.image);
  const before = sentenceOf(view, block);
  view.position = position;
  if (sentenceOf(view, block) !== before) view.word = null;
  drawImageViews(view);
  if (controls.query.value === "sentence") {
    cancelAnimationFrame(view.frame); // the strip follows when there is time
    view.frame = requestAnimationFrame(() => drawStrip(view));
  }
}

function letGo(view) {
  view.kept = false;
  view.word = null;
  drawImageViews(view);
}

function listenToSentences(view) {
  const {image} = view;
  const same = (position) => {
    const block = currentBlock(image);
    return sentenceOf({...view, position}, block) === sentenceOf(view, block);
  };
  view.sentences.addEventListener("pointermove", (event) => {
    if (!view.kept) moveSentence(view, pointed(event, image.size));
  });
  view.sentences.addEventListener("pointerdown", (event) => {
    const position = pointed(event, image.size);
    view.kept = !(view.kept && same(position));
    moveSentence(view, position);
  });
  view.sentences.addEventListener("keydown", (event) => {
    if (event.key === "Escape") letGo(view);
    if (event.key === "Enter") view.kept = !view.kept;
    const step = ARROWS[event.key];
    if (step) {
      const cell = sentenceSide(image, currentBlock(image));
      moveSentence(view, view.position.map((x, axis) =>
        Math.min(Math.max(x + step[axis] * cell, 0), image.size[axis] - 1e-3)));
    }
    if (step || event.key === "Enter") event.preventDefault();
  });
}

function listenToWords(view) {
  const block = () => currentBlock(view.image);
  const point = (event) => {
    const side = wordsPerSide(block());
    const [row, column] = pointed(event, [side, side]).map(Math.floor);
    view.word = block().words ? row * side + column : null;
    drawWords(view);
  };
  view.words.addEventListener("pointermove", point);
  view.words.addEventListener("pointerdown", point);
  view.words.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step || !block().words) return;
    event.preventDefault();
    const side = wordsPerSide(block());
    const word = view.word ?? 0;
    const move = view.word === null ? [0, 0] : step;
    const [row, column] = rowAndColumn(word, side)
      .map((x, axis) => Math.min(Math.max(x + move[axis], 0), side - 1));
    view.word = row * side + column;
    drawWords(view);
  });
}

function showPredictions(view) {
  listPredictions(view.predictions, view.image.predictions);
  view.predictions.hidden = !view.image.predictions.length;
}

function makeStrip(view) {
  view.image.blocks.forEach((_, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `block ${index + 1}`);
    button.append(document.createElement("canvas"), `${index + 1}`);
    button.addEventListener("click", () => chooseBlock(index + 1));
    view.strip.append(button);
  });
}

function makeView(image) {
  placeBlocks(image);
  const root = byId("image").content.firstElementChild.cloneNode(true);
  const find = (name) => root.querySelector(`.${name}`);
  const view = {
    image, kept: false, word: null, position: image.size.map((n) => n / 2),
    picture: new Image(), sentences: find("sentences"), words: find("words"),
    wordsCaption: find("words-caption"), reading: find("reading"),
    wordReading: find("word-reading"), strip: find("strip"), predictions: find("predictions"),
  };
  root.querySelector("h2").textContent = image.name;
  showPredictions(view);
  makeStrip(view);
  listenToSentences(view);
  listenToWords(view);
  byId("images").append(root);
  return view;
}

function chooseBlock(block) {
  controls.block.value = block;
  drawAll();
}

let timer = null;

function play() {
  const running = timer !== null;
  clearInterval(timer);
  timer = running ? null : setInterval(
    () => chooseBlock(controls.block.value % controls.block.max + 1), PLAY_MS);
  byId("play").textContent = running ? "Play blocks" : "Stop";
}

// ---------------------------------------------------------------------------------------- start

function introduce() {
  const cut = sentenceSide(data.images[0], data.images[0].blocks[0]);
  const word = cut / wordsPerSide(data.images[0].blocks.find((block) => block.words));
  byId("network").textContent = data.network;
  byId("cut").textContent = `${cut}x${cut}`;
  byId("word").textContent = `${word}x${word}`;
  byId("readout").textContent = data.readout
    + (data.class_token ? ", which stands beside the sentences and attends to them" : "");
  byId("precision").textContent = "Attention weights are stored as bytes: an error of at most 0.2 % "
    + "of the largest weight of a sentence."
    + (data.mean_of_heads ? " This page has the mean of the heads only." : "");
  controls.query.options[0].text = data.readout;
  controls.block.max = data.images[0].blocks.length;
}

introduce();
const views = data.images.map(makeView);
fillHeads();
for (const control of Object.values(controls)) control.addEventListener("input", drawAll);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("play").addEventListener("click", play);
Promise.all(views.map((view) => {
  view.picture.src = view.image.pixels;
  return view.picture.decode();
})).then(() => {
  drawAll();
  new ResizeObserver(drawAll).observe(byId("images"));
  document.documentElement.dataset.ready = "true";
});
