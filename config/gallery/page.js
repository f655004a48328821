const find = selector => document.querySelector(selector);
const clamp = value => Math.min(100, Math.max(0, value));
const newest = facts.images.reduce((a, b) => b.time > a.time ? b : a);

// An image's name here: as much of its source's path as tells it from the others.
const tails = source => source.split("/").map((_, index, parts) => parts.slice(-1 - index).join("/"));
const uses = new Map();
for (const source of new Set(facts.images.map(image => image.source)))
  for (const tail of tails(source)) uses.set(tail, (uses.get(tail) ?? 0) + 1);
for (const image of facts.images) image.name = tails(image.source).find(tail => uses.get(tail) === 1) ?? image.name;
const made = image => `${image.checkpoint}, step ${image.step}, ${count(image.last, "stage")}`;

function makeButton(text, parent, action) {
  const button = make("button", text, parent);
  button.className = "button";
  button.onclick = action;
  return button;
}

function card(image) {
  const article = find("template").content.cloneNode(true).firstElementChild;
  const part = selector => article.querySelector(selector);
  const compare = part(".compare"), pan = part(".pan"), canvas = part(".canvas"), border = part(".border");
  const [leftLabel, rightLabel] = compare.querySelectorAll("span");
  const at = url => `${url}?${image.time}`;  // an earlier picture of this address may be in the browser's cache
  const side = Math.max(image.width, image.height);
  const truth = image.views.find(view => view.label === "Ground truth");
  const result = image.views[image.last];
  let left = image.views[0], right = result, position = 50, zoom = 0;  // zoom 0: fit

  article.id = image.key;
  part("h2").textContent = image.name;
  part("h2").title = image.source;
  make("small", `${image.width} × ${image.height}`, part("h2"));
  compare.style.setProperty("--width", image.width);
  compare.style.setProperty("--ratio", image.width / image.height);
  compare.classList.toggle("tiny", side < 200);
  border.setAttribute("aria-label", `${image.name}: border between left and right image`);

  // ---- what is compared
  function show() {
    for (const [view, label, name] of [[left, leftLabel, ".left"], [right, rightLabel, ".right"]]) {
      const url = at(zoom && view.full || view.url);
      if (part(name).getAttribute("src") !== url) part(name).src = url;
      part(name).alt = `${view.label} of ${image.name}`;
      label.textContent = view === result ? `Result (${view.label.toLowerCase()})` : view.label;
      if (zoom && view.side < side) label.textContent += `, enlarged from ${view.side} pixels`;
    }
    for (const button of article.querySelectorAll("[aria-label$=half] button"))
      button.setAttribute("aria-pressed", button.view === (button.closest(".against") ? left : right));
    place();
  }
  function place() {
    border.style.left = `${position}%`;
    const x = position / 100 * compare.clientWidth + pan.scrollLeft - canvas.offsetLeft;  // of the border in the canvas
    part(".left").style.clipPath = `inset(0 calc(100% - ${zoom ? `${x}px` : `${position}%`}) 0 0)`;
    border.setAttribute("aria-valuenow", Math.round(position));
    border.setAttribute("aria-valuetext", `${Math.round(position)} % ${left.label}, the rest ${right.label}`);
    leftLabel.hidden = position < 8;
    rightLabel.hidden = position > 92;
  }
  function move(value) { position = clamp(value); place(); }

  // ---- the zoom: image pixels are pixels of the screen, `zoom` times as large
  const zooms = [[0, "Fit"], [1, "1:1"], [2, "2:1"], [4, "4:1"]].map(([value, text]) => {
    const button = makeButton(text, part("[aria-label=Zoom]"), () => zoomTo(value));
    button.zoom = value;
    return button;
  });
  part("[aria-label=Zoom]").append(part("[aria-label=Zoom] a"));
  function zoomTo(value, x, y) {  // the image's point at (x, y) of the window, by default in the middle, stays there
    const box = compare.getBoundingClientRect(), before = canvas.getBoundingClientRect();
    x ??= box.left + box.width / 2;
    y ??= box.top + box.height / 2;
    zoom = value;
    compare.classList.toggle("zoomed", zoom > 0);
    compare.classList.toggle("enlarged", zoom > 1);
    canvas.style.width = zoom ? `${image.width * zoom / devicePixelRatio}px` : "";
    canvas.style.height = zoom ? "var(--tall)" : "";
    compare.style.setProperty("--tall", `${image.height * zoom / devicePixelRatio}px`);
    pan.tabIndex = zoom ? 0 : -1;
    const after = compare.getBoundingClientRect();
    pan.scrollLeft = canvas.offsetLeft + (x - before.left) / before.width * canvas.offsetWidth - (x - after.left);
    pan.scrollTop = canvas.offsetTop + (y - before.top) / before.height * canvas.offsetHeight - (y - after.top);
    for (const button of zooms) button.setAttribute("aria-pressed", button.zoom === zoom);
    show();
  }
  new ResizeObserver(() => {
    place();
    zooms[0].textContent = zoom ? "Fit" : `Fit (${Math.round(canvas.clientWidth * devicePixelRatio / image.width * 100)} %)`;
  }).observe(compare);
  pan.onscroll = () => place();
  compare.ondblclick = event => { if (event.target !== border) zoomTo(zoom ? 0 : 1, event.clientX, event.clientY); };

  // ---- mouse, fingers, keys
  let dragged = "";
  function follow(event) {
    const box = compare.getBoundingClientRect();
    if (dragged === "border") move((event.clientX - box.left) / box.width * 100);
    else pan.scrollBy(-event.movementX, -event.movementY);
  }
  compare.onpointerdown = event => {
    dragged = !zoom || event.target === border ? "border" : event.pointerType === "mouse" ? "canvas" : "";
    const onBar = event.offsetX > pan.clientWidth || event.offsetY > pan.clientHeight;
    if (event.button || !dragged || event.target === pan && onBar) return;
    compare.setPointerCapture(event.pointerId);
    if (dragged === "border") follow(event);
  };
  compare.onpointermove = event => { if (compare.hasPointerCapture(event.pointerId)) follow(event); };
  border.onkeydown = event => {
    const step = event.shiftKey ? 10 : 2;
    const to = {ArrowLeft: position - step, ArrowDown: position - step, ArrowRight: position + step,
      ArrowUp: position + step, PageDown: position - 20, PageUp: position + 20, Home: 0, End: 100}[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(to);
  };

  // ---- facts, and buttons that choose what is compared
  function row(name, value) { make("dt", name, part("dl")); make("dd", value, part("dl")); }
  const pairs = result.scores ? [0, 1].map(index => [image.views[0].scores[index], result.scores[index]]) : [];
  pairs.forEach((pair, index) => {
    if (!pair.includes(null)) row(["PSNR", "SSIM"][index], change(pair, index ? 4 : 2) + (index ? "" : " dB"));
  });
  row("Mean change", image.change.toFixed(1));
  row("Restored", `${when(image.time)}, ${image.seconds.toFixed(2)} s`);
  if (made(image) !== made(newest)) row("By", made(image));
  Object.assign(part("[aria-label=Zoom] a"), {href: at(image.result), download: image.file.split("/").pop()});

  part(".against").hidden = !truth;
  for (const view of truth ? [image.views[0], truth] : [])
    makeButton(view.label, part(".against"), () => { left = view; show(); }).view = view;
  image.views.forEach((view, index) => {
    if (!index) return;  // the input is on the left
    const button = make("button", "", part(".views"));
    const picture = make("img", "", make("div", "", button));
    Object.assign(picture, {loading: "lazy", alt: "", src: at(view.url), draggable: false});
    make("span", view.label === "Rain layer" && image.gain > 1 ? `${view.label} × ${image.gain}` : view.label, button);
    if (view.scores && view.scores[0] !== null) make("small", `${view.scores[0].toFixed(2)} dB`, button);
    button.view = view;
    button.onclick = () => { right = view; show(); };
  });
  article.toggleZoom = () => zoomTo(zoom ? 0 : 1);
  zoomTo(0);

  const item = document.createElement("li"), link = make("a", "", item);
  link.href = `#${image.key}`;
  link.title = image.name;
  Object.assign(make("img", "", link), {loading: "lazy", alt: "", src: at(`page/${image.key}/thumbnail.jpg`)});
  make("span", image.name, link);
  return {image, article, item, link};
}

// ---------------------------------------------------------------- the list of images
const [filter, sort, back, forth] = find("nav .row").children;
const cards = facts.images.map(card);
let current = 0, jumped = 0;  // the image that is read: its number among those that are shown, when it was chosen here
const shown = () => cards.filter(({article}) => !article.hidden);
const psnr = ({image}) => image.views[image.last].scores?.[0] ?? 0;
const byName = (a, b) => a.image.name.localeCompare(b.image.name, "en", {numeric: true});
const orders = {
  newest: (a, b) => b.image.time - a.image.time || byName(a, b),
  name: byName,
  worst: (a, b) => psnr(a) - psnr(b),
  best: (a, b) => psnr(b) - psnr(a),
  change: (a, b) => b.image.change - a.image.change,
};

function mark(number) {
  const list = shown();
  current = Math.max(0, Math.min(list.length - 1, number));
  find("nav small").textContent = list.length ? `${current + 1} / ${list.length}` : "no match";
  for (const {link} of cards) link.removeAttribute("aria-current");
  if (!list.length) return;
  const {link, item} = list[current], box = find("nav ol");
  link.setAttribute("aria-current", "true");
  const at = item.getBoundingClientRect(), around = box.getBoundingClientRect();  // scrollIntoView would move the page
  box.scrollBy(Math.max(0, at.right - around.right) + Math.min(0, at.left - around.left),
    Math.max(0, at.bottom - around.bottom) + Math.min(0, at.top - around.top));
}
function go(number) {
  mark(number);
  jumped = performance.now();
  shown()[current]?.article.scrollIntoView();
}
function arrange() {
  cards.sort(orders[sort.value]);
  for (const {image, article, item} of cards)
    article.hidden = item.hidden = !image.name.toLowerCase().includes(filter.value.trim().toLowerCase());
  find("main").append(...cards.map(({article}) => article));
  find("nav ol").append(...cards.map(({item}) => item));
  mark(0);
}
for (const name of facts.psnr ? [] : ["worst", "best"]) sort.querySelector(`[value=${name}]`).remove();
filter.oninput = sort.onchange = arrange;
back.onclick = () => go(current - 1);
forth.onclick = () => go(current + 1);
cards.forEach(each => each.link.onclick = event => { event.preventDefault(); go(shown().indexOf(each)); });
document.addEventListener("keydown", event => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "n") go(current + 1);
  if (event.key === "p") go(current - 1);
  if (event.key === "z") (event.target.closest("article") ?? shown()[current]?.article)?.toggleZoom();
});
document.addEventListener("scroll", () => {
  if (performance.now() - jumped < 300) return;
  const at = shown().findIndex(({article}) => article.getBoundingClientRect().bottom > 200);  // pixels below the top
  if (at >= 0 && at !== current) mark(at);
}, {passive: true});

document.title = `${facts.name}: derained images`;
find("h1").textContent = facts.name;
find("#made").textContent = `${made(newest)}; ${count(cards.length, "image")}`;
find("#means").textContent = [facts.psnr && `PSNR ${change(facts.psnr, 2)} dB`, facts.ssim && `SSIM ${change(facts.ssim, 4)}`]
  .filter(Boolean).join(", ");
find("nav").hidden = cards.length < 2;
document.body.classList.toggle("many", cards.length > 1);
arrange();
