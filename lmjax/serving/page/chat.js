"use strict";
const $ = id => document.getElementById(id);
const NAMES = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed", "tokens"];
const USUAL = { system: "", temperature: "0.8", top_p: "1", top_k: "", max_tokens: "512", seed: "", tokens: false };
const TOPS = 5; // most likely tokens that are asked for
let talk = [];       // messages: { role, text, tokens, note }
let underway = null; // what breaks off the answer that is being written
let editing = -1;    // number of the message that is changed

// All texts go through here, and only as text.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function button(words, act, attributes = {}) {
  const node = make("button", { type: "button", ...attributes }, words);
  node.onclick = act;
  return node;
}
function note(words) {
  $("note").hidden = !words;
  $("note").textContent = words ?? "";
}

// ---- key and settings ----------------------------------------------------------------------
function keep(area, name, value) {
  try { area.setItem(name, value); } catch { /* a browser that keeps nothing */ }
}
function kept(area, name) {
  try { return area.getItem(name); } catch { return null; }
}
let key = kept(sessionStorage, "key") ?? "";
if (location.hash.startsWith("#key=")) { // which is not sent to any server, and leaves the address
  key = decodeURIComponent(location.hash.slice(5));
  keep(sessionStorage, "key", key);
  history.replaceState(null, "", location.pathname);
}
function readSettings() {
  let values = {};
  try { values = JSON.parse(kept(localStorage, "settings")) ?? {}; } catch { /* the usual ones */ }
  for (const name of NAMES) {
    const value = values[name] ?? USUAL[name];
    if (name === "tokens") $(name).checked = value === true; else $(name).value = value;
  }
  showSettings();
}
function showSettings() {
  for (const name of ["temperature", "top_p"]) $(`${name}-shown`).textContent = Number($(name).value).toFixed(2);
}
function keepSettings() {
  showSettings();
  const values = {};
  for (const name of NAMES) values[name] = name === "tokens" ? $(name).checked : $(name).value;
  keep(localStorage, "settings", JSON.stringify(values));
}
function wanted() {
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  body.messages = talk.map(({ role, text }) => ({ role, content: text }));
  if ($("system").value.trim()) body.messages.unshift({ role: "system", content: $("system").value });
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  if ($("tokens").checked) Object.assign(body, { logprobs: true, top_logprobs: TOPS });
  return body;
}

// ---- server --------------------------------------------------------------------------------
async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const sent = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers };
  const reply = await fetch(path, sent);
  if (reply.ok) return reply;
  let words = `the server answers with status ${reply.status}`;
  try { words = (await reply.json()).error.message; } catch { /* no words of its own */ }
  const error = new Error(words);
  error.status = reply.status;
  throw error;
}
async function enter() {
  note("");
  try {
    const models = await (await ask("/v1/models")).json();
    $("model").replaceChildren(...models.data.map(({ id }) => make("option", { value: id }, id)));
    $("door").hidden = true;
    $("text").disabled = $("send").disabled = false;
    $("text").focus();
  } catch (error) {
    $("door").hidden = error.status !== 401;
    if (error.status === 401) { $("key").focus(); if (!key) return; }
    note(error.status ? error.message : "The server does not answer.");
  }
}
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// ---- writing -------------------------------------------------------------------------------
async function answer() {
  const message = { role: "assistant", text: "", tokens: [], note: "" };
  const body = wanted();
  talk.push(message);
  underway = new AbortController();
  note(""); draw();
  const begun = performance.now();
  try {
    for await (const event of events(await ask("/v1/chat/completions", body, underway.signal))) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        message.text += choice.delta.content ?? "";
        message.tokens.push(...(choice.logprobs?.content ?? []));
        if (choice.finish_reason === "length") message.note = "cut off";
      }
      if (event.usage) {
        const seconds = (performance.now() - begun) / 1000;
        const count = event.usage.completion_tokens;
        message.note = [`${count} tokens, ${(count / seconds).toFixed(1)} a second`, message.note].filter(Boolean).join(", ");
      }
      drawBody(talk.length - 1);
    }
    $("said").textContent = message.text;
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else note(error.status || error.message ? error.message : "The server does not answer.");
    if (!message.text && error.name !== "AbortError") talk.pop();
  }
  underway = null;
  draw();
}
function send(event) {
  event?.preventDefault();
  const text = $("text").value;
  if (!text.trim() || underway) return;
  $("text").value = "";
  editing = -1;
  talk.push({ role: "user", text });
  answer();
}
function again(number) {
  talk.length = number;
  answer();
}

// ---- what is shown -------------------------------------------------------------------------
function draw() {
  $("talk").replaceChildren(...talk.map(drawn));
  $("send").hidden = Boolean(underway);
  $("stop").hidden = !underway;
  const main = document.querySelector("main");
  main.scrollTop = main.scrollHeight;
}
function drawn(message, number) {
  const last = number === talk.length - 1, writing = last && underway;
  const box = make("article", { class: `message ${message.role}${writing ? " writing" : ""}` }, make("div", { class: "role" }, message.role));
  if (number === editing) {
    const field = make("textarea", { rows: 4, dir: "auto", "aria-label": "changed message" });
    field.value = message.text;
    box.append(field, make("div", { class: "edit" },
      button("Save", () => change(number, field.value), { class: "main" }),
      button("Cancel", () => { editing = -1; draw(); }, { class: "round" })));
    return box;
  }
  box.append(body(message));
  const tools = make("div", { class: "tools" });
  const off = underway ? { disabled: "" } : {};
  tools.append(button("Edit", () => { editing = number; draw(); document.querySelector(".message textarea").focus(); }, off));
  if (message.role === "assistant") tools.append(button("Regenerate", () => again(number), off));
  tools.append(button("Copy", () => navigator.clipboard?.writeText(message.text)));
  if (message.note) tools.append(make("span", { class: "soft" }, message.note));
  box.append(tools);
  return box;
}
function change(number, text) {
  editing = -1;
  talk[number].text = text;
  talk[number].tokens = [];
  if (talk[number].role === "user") { // what follows answered the old text
    talk.length = number + 1;
    answer();
  } else draw();
}
function body(message) {
  const node = make("div", { class: "body", dir: "auto" });
  if (!message.tokens?.length) { node.textContent = message.text; return node; }
  for (const token of message.tokens) {
    const share = Math.round(45 * Math.min(1, -token.logprob / 5));
    const span = make("span", { class: "token", tabindex: "0" }, token.token);
    span.style.setProperty("--share", `${share}%`);
    span.onmouseenter = span.onfocus = () => tip(span, token);
    span.onmouseleave = span.onblur = () => $("tip")?.remove();
    node.append(span);
  }
  return node;
}
function tip(span, token) {
  $("tip")?.remove();
  const shown = [...token.top_logprobs];
  const same = one => String(one.bytes) === String(token.bytes); // parts of characters look alike
  if (!shown.some(same)) shown.push(token);
  const rows = shown.map(one => make("tr", same(one) ? { class: "chosen" } : {},
    make("td", {}, JSON.stringify(one.token)), make("td", {}, `${(100 * Math.exp(one.logprob)).toFixed(1)} %`)));
  const box = make("div", { id: "tip", role: "tooltip" }, make("table", {}, ...rows));
  document.body.append(box);
  const { left, bottom } = span.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${Math.min(bottom + 5, innerHeight - box.offsetHeight - 8)}px`;
}
function drawBody(number) {
  const node = $("talk").children[number]?.querySelector(".body");
  if (!node) return;
  const main = document.querySelector("main");
  const low = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
  node.replaceWith(body(talk[number]));
  if (low) main.scrollTop = main.scrollHeight;
}

// ---- controls ------------------------------------------------------------------------------
$("writer").onsubmit = send;
$("text").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
};
$("stop").onclick = () => underway?.abort();
$("fresh").onclick = () => { underway?.abort(); talk = []; editing = -1; note(""); draw(); $("text").focus(); };
$("panel").onclick = () => {
  $("settings").hidden = !$("settings").hidden;
  $("panel").setAttribute("aria-expanded", String(!$("settings").hidden));
};
$("settings").oninput = keepSettings;
$("theme").onclick = () => {
  const dark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
};
$("door").onsubmit = event => {
  event.preventDefault();
  key = $("key").value;
  keep(sessionStorage, "key", key);
  enter();
};
document.onkeydown = event => {
  if (event.key === "Escape") underway?.abort();
};
readSettings();
enter();
