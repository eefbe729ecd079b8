"use strict";
// Everything works on what the server has written into the page; nothing is fetched from elsewhere.

const $ = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

// ---------------------------------------------------------------- live edits

function studio(section) {
  const live = $("#live"), form = $("form", section), pace = $("#pace");
  const sliders = all("input[type=range]", form);
  const command = $(".command", section);
  let isBusy = false, isWaiting = false, since = 0, shown = "";

  const isMoved = (s) => Number(s.value) !== Number(s.dataset.start);
  const moved = () => sliders.filter(isMoved);
  const address = () => {
    const url = new URL(section.dataset.base, location.href);
    for (const s of moved()) url.searchParams.set(s.name, s.value);
    return url;
  };

  // One step at a time, and always the latest: a fast hand skips steps, it never queues them.
  async function step() {
    if (isBusy) { isWaiting = true; return; }
    isBusy = true;
    const began = since;
    try {
      const answer = await fetch(address());
      if (!answer.ok) throw new Error(await answer.text());
      const next = URL.createObjectURL(await answer.blob());
      const image = new Image();
      image.src = next;
      await image.decode();
      live.src = next;
      URL.revokeObjectURL(shown);
      shown = next;
      performance.measure("step", { start: began, end: performance.now() });
      pace.textContent = `${Math.round(performance.now() - began)} ms`;
      live.dataset.steps = Number(live.dataset.steps || 0) + 1;
      live.dataset.values = JSON.stringify(Object.fromEntries(moved().map((s) => [s.name, s.value])));
    } catch (error) {
      pace.textContent = "not rendered";
      console.error(error);
    }
    isBusy = false;
    if (isWaiting) { isWaiting = false; step(); }
  }

  function changed() {
    since = performance.now();
    for (const s of sliders) {
      const value = Number(s.value);
      s.nextElementSibling.value = value > 0 && s.dataset.kind === "direction" ? `+${value}` : value;
      s.closest(".slider").classList.toggle("moved", isMoved(s));
    }
    say();
    step();
  }

  const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  function say() {
    const wanted = moved().filter((s) => s.dataset.kind !== "residual");
    command.hidden = !wanted.length;
    const parts = wanted.map((s) => s.dataset.kind === "direction"
      ? `--edit ${quoted(`${s.dataset.argument}=${s.value > 0 ? "+" : ""}${s.value}`)}`
      : `--domain ${quoted(`${s.dataset.argument}=${s.value}`)}`);
    $("#command").textContent = `refinery edit ${quoted(section.dataset.run)} OUT ${parts.join(" ")}`;
  }

  form.addEventListener("input", changed);
  form.addEventListener("reset", () => setTimeout(changed));
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const s of sliders) {
    s.addEventListener("dblclick", () => { s.value = s.dataset.start; changed(); });
  }

  const compare = $("#compare");
  const hold = (isHeld) => {
    if (compare.getAttribute("aria-pressed") === String(isHeld)) return;
    compare.setAttribute("aria-pressed", String(isHeld));
    live.src = isHeld || !shown ? section.dataset.base : shown;
  };
  compare.addEventListener("pointerdown", () => hold(true));
  for (const end of ["pointerup", "pointercancel", "pointerleave", "blur"]) {
    compare.addEventListener(end, () => hold(false));
  }
  compare.addEventListener("keydown", (event) => { if (event.key === " " || event.key === "Enter") hold(true); });
  compare.addEventListener("keyup", () => hold(false));
}

// ---------------------------------------------------------------- the grid and its selection

function selection(grid) {
  const bar = $(".selection"), boxes = all("input[data-key]", grid);
  if (!bar) return;
  const place = `selected:${grid.dataset.run}`;
  const chosen = new Set(JSON.parse(sessionStorage.getItem(place) || "[]"));

  function show() {
    try {
      sessionStorage.setItem(place, JSON.stringify([...chosen]));
    } catch { /* more than a browser keeps: this page has them all the same */ }
    for (const box of boxes) {
      box.checked = chosen.has(box.dataset.key);
      box.closest(".tile").classList.toggle("chosen", box.checked);
    }
    bar.hidden = !chosen.size;
    document.body.classList.toggle("selecting", !!chosen.size);
    $("#selected").textContent = `${chosen.size.toLocaleString("en")} selected`;
  }
  for (const box of boxes) {
    box.addEventListener("change", () => {
      chosen[box.checked ? "add" : "delete"](box.dataset.key);
      show();
    });
  }
  const actions = {
    page: () => boxes.forEach((box) => chosen.add(box.dataset.key)),
    clear: () => chosen.clear(),
    all: async () => {
      const answer = await fetch(bar.dataset.all);
      for (const key of await answer.json()) chosen.add(key);
    },
  };
  for (const button of all("[data-do]", bar)) {
    button.addEventListener("click", async () => { await actions[button.dataset.do](); show(); });
  }
  bar.addEventListener("submit", () => { bar.elements.keys.value = JSON.stringify([...chosen]); });
  addEventListener("pageshow", show);
  show();
}

function keyboard(grid) {
  const links = all(".tile > a", grid);
  const columns = () => {
    const top = links[0] && links[0].getBoundingClientRect().top;
    return Math.max(1, links.filter((a) => a.getBoundingClientRect().top === top).length);
  };
  grid.addEventListener("keydown", (event) => {
    const at = links.indexOf(document.activeElement);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in steps) {
      const next = links[at + steps[event.key]];
      if (next) { event.preventDefault(); next.focus(); }
    } else if (event.key === "x") {
      $("input[data-key]", links[at].closest(".tile")).click();
    }
  });
}

function shortcuts() {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input:not([type=checkbox]), textarea, select")) return;
    if (event.key === "/" && $("#search")) { event.preventDefault(); $("#search").focus(); }
    const way = { n: "next", p: "prev" }[event.key];
    const link = way && $(`a[rel=${way}]`);
    if (link) location.href = link.href;
  });
}

// ---------------------------------------------------------------- neighbours, photo, SQL

function neighbours(box) {
  $("button", box).addEventListener("click", async () => {
    box.textContent = "Looking...";
    try {
      const answer = await fetch(box.dataset.load);
      const text = await answer.text();
      if (!answer.ok) throw new Error(answer.status);
      box.innerHTML = text;
      const grid = $(".grid", box);
      keyboard(grid);
      const first = $("a", grid);
      if (first) first.focus({ preventScroll: true });
    } catch (error) {
      box.textContent = `Not found: ${error.message}`;
    }
  });
}

function drop(form) {
  const file = $("#file", form), progress = $("#progress", form);
  async function send(picture) {
    if (!picture) return;
    form.classList.add("busy");
    progress.textContent = "Inverting... the first one also loads the networks.";
    try {
      const answer = await fetch(form.dataset.post, {
        method: "POST", body: picture,
        headers: { Accept: "application/json", "Content-Type": "application/octet-stream" },
      });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error);
      location.href = found.address;
    } catch (error) {
      form.classList.remove("busy");
      progress.textContent = `That did not work: ${error.message}`;
    }
  }
  file.addEventListener("change", () => send(file.files[0]));
  for (const name of ["dragenter", "dragover"]) {
    addEventListener(name, (event) => { event.preventDefault(); form.classList.add("over"); });
  }
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) form.classList.remove("over"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("over");
    send(event.dataTransfer.files[0]);
  });
}

function sql(form) {
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      $("button.main", form).click();
    }
  });
}

all(".studio").forEach(studio);
all(".grid[data-run]").forEach((grid) => { selection(grid); keyboard(grid); });
all(".near").forEach(neighbours);
all("form.drop").forEach(drop);
all("form.sql").forEach(sql);
shortcuts();
