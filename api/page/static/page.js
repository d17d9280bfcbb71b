"use strict";
// Everything here adds to pages that work without it: live news, sliders, dropping files, questions before an act.

document.documentElement.classList.add("scripted");
const connection = document.getElementById("connection");

function warn(text) {
  if (!connection) return;
  connection.textContent = text || "";
  connection.hidden = !text;
}

// ---- live pages ----
// News only triggers a new reading of this page; the server's answer is the truth. So a reload, a lost connection or a
// restart of the server leaves no gap and shows nothing twice.

const live = document.querySelector("[data-live]");
const EVERY = 600;
const known = new WeakMap();
let stream = null, cursor = null, reading = false, wanted = false, readAt = 0, over = false;

function listen() {
  if (stream) stream.close();
  const address = new URL(live.dataset.live, location.origin);
  if (cursor) address.searchParams.set("after", cursor);
  stream = new EventSource(address);
  stream.onopen = () => { warn(""); refresh(); };
  for (const name of ["message", "metrics", "state"]) {
    stream.addEventListener(name, (event) => { cursor = event.lastEventId || cursor; refresh(); });
  }
  stream.addEventListener("end", () => { over = true; stream.close(); refresh(); });
  stream.onerror = () => {
    if (over) return;
    warn(connection.dataset.lost);
    if (stream.readyState === EventSource.CLOSED) setTimeout(() => { if (!document.hidden) listen(); }, 3000);
  };
}

function refresh() {
  wanted = true;
  if (reading || document.hidden) return;
  reading = true;
  setTimeout(read, Math.max(0, readAt + EVERY - Date.now()));
}

async function read() {
  wanted = false;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, redirect: "manual" });
    if (answer.type === "opaqueredirect" || answer.status === 401) { warn(connection.dataset.ended); over = true; if (stream) stream.close(); }
    else if (answer.ok) { show(new DOMParser().parseFromString(await answer.text(), "text/html")); warn(""); }
    else throw new Error(String(answer.status));
  } catch {
    warn(connection.dataset.lost);
    setTimeout(refresh, 3000);
  }
  readAt = Date.now();
  reading = false;
  if (wanted) refresh();
}

function show(page) {
  for (const old of document.querySelectorAll("[data-live], [data-part]")) {
    const made = page.getElementById(old.id);
    if (!made) continue;
    const news = plain(made);
    if (news === known.get(old)) continue;
    known.set(old, news);
    const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
    const values = [...old.querySelectorAll("input[type=range]")].map((each) => each.value);
    old.className = made.className;
    old.replaceChildren(...made.childNodes);
    old.querySelectorAll("input[type=range]").forEach((each, index) => { if (values[index]) each.value = values[index]; });
    enhance(old);
    if (focused) document.getElementById(focused)?.focus();
  }
}

function plain(part) { return part.className + part.innerHTML; }

// ---- sliders, questions, buttons ----

function enhance(root) {
  for (const slider of root.querySelectorAll(".compare input[type=range]")) {
    const stack = slider.closest(".compare").querySelector(".stack");
    const move = () => stack.style.setProperty("--at", `${slider.value}%`);
    slider.addEventListener("input", move);
    move();
  }
}

document.addEventListener("submit", (event) => {
  const button = event.submitter;
  if (button?.dataset.confirm && !confirm(button.dataset.confirm)) { event.preventDefault(); return; }
  // After the form's data are collected: a disabled button sends no value.
  setTimeout(() => { if (!event.defaultPrevented && button) button.disabled = true; });
});
window.addEventListener("pageshow", () => document.querySelectorAll("button[disabled]").forEach((each) => { each.disabled = false; }));

// ---- files: dropped anywhere on the form, sent in small groups, so that each is judged early ----

const GROUP = 4;
for (const form of document.querySelectorAll("form[data-drop]")) {
  const input = form.querySelector("input[type=file]");
  const status = form.querySelector("[role=status]");
  for (const name of ["dragover", "dragleave", "drop"]) {
    form.addEventListener(name, (event) => { event.preventDefault(); form.classList.toggle("drop", name === "dragover"); });
  }
  form.addEventListener("drop", (event) => send(form, [...event.dataTransfer.files], status));
  form.addEventListener("submit", (event) => { event.preventDefault(); send(form, [...input.files], status); });
  input.addEventListener("change", () => send(form, [...input.files], status));
}

async function send(form, files, status) {
  if (!files.length || form.dataset.busy) return;
  form.dataset.busy = "1";
  let address = form.action;
  for (let at = 0; at < files.length; at += GROUP) {
    status.textContent = form.dataset.sending.replace("{done}", at).replace("{all}", files.length);
    const body = new FormData();
    for (const file of files.slice(at, at + GROUP)) body.append("file", file, file.name);
    let answer;
    try { answer = await fetch(address, { method: "POST", body, headers: { Accept: "text/html" } }); }
    catch { status.textContent = form.dataset.failed; delete form.dataset.busy; return; }
    if (!answer.ok) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      status.textContent = page.querySelector("[role=alert]")?.textContent || form.dataset.failed;
      delete form.dataset.busy;
      return;
    }
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    address = page.querySelector("form[data-drop]")?.action || address;
    if (at + GROUP >= files.length) location.assign(answer.url);
  }
}

// ---- captions and settings of a draft: kept as they are changed ----

for (const form of document.querySelectorAll("form[data-kept]")) {
  let timer = 0;
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => keep(form), 700);
  });
}

async function keep(form) {
  const status = form.querySelector("[data-saved]");
  try {
    const answer = await fetch(form.dataset.kept, { method: "POST", body: new URLSearchParams(new FormData(form)), redirect: "follow" });
    if (!answer.ok) throw new Error(String(answer.status));
    status.textContent = status.dataset.saved;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const estimate = page.getElementById("estimate");
    if (estimate) document.getElementById("estimate").replaceChildren(...estimate.childNodes);
  } catch {
    status.textContent = status.dataset.failed;
  }
}

for (const part of document.querySelectorAll("[data-live], [data-part]")) known.set(part, plain(part));
enhance(document);
if (live && !("still" in live.dataset)) {
  listen();
  // The place in the queue and the time left change without an event.
  setInterval(() => { if (!over) refresh(); }, 10000);
  // A browser opens few connections to one server: a tab that nothing looks at gives its own back.
  document.addEventListener("visibilitychange", () => {
    if (over) return;
    if (document.hidden) stream.close();
    else { refresh(); listen(); }
  });
}
