// The page: sends messages to the worker and shows what comes back. All text goes in as text nodes.
"use strict";

const TEXTS = { // English, Korean
  new_chat: ["New chat", "새 대화"], send: ["Send", "보내기"], stop: ["Stop", "멈추기"], log: ["Conversation", "대화"],
  other: ["한국어", "English"], about: ["This model", "이 모델"], card: ["Model card", "모델 카드"], settings: ["Settings", "설정"],
  kind: ["chat model", "대화 모델"], kind_base: ["base model", "베이스 모델"], loading: ["Loading …", "불러오는 중 …"],
  offline: ["Runs in this page. Nothing leaves it.", "이 페이지 안에서 실행되며, 아무것도 밖으로 나가지 않습니다."],
  placeholder: ["Say something", "메시지를 입력하세요"], placeholder_base: ["The beginning of a text", "이어 쓸 글의 첫머리"],
  greeting: ["Say something, or try one of these.", "말을 걸거나 예시를 골라 보세요."],
  greeting_base: ["This model was not taught to answer: it goes on with the text that you begin.",
    "대화를 배우지 않은 모델입니다. 글의 첫머리를 주면 이어서 씁니다."],
  temperature: ["Temperature", "온도"], temperature_info: ["0: the likeliest token each time", "0이면 항상 가장 그럴듯한 토큰"],
  top_k_info: ["choose among so many tokens; 0: among all", "이 개수의 토큰 중에서 선택, 0이면 전체"], top_k: ["Top-k", "Top-k"],
  max_tokens: ["Longest answer", "답변 최대 길이"], speed: ["tokens/s", "토큰/초"],
  forgotten: ["the context is full: the oldest messages are forgotten", "문맥이 가득 차서 가장 오래된 메시지는 잊었습니다"],
  too_long: ["This message is too long:", "메시지가 너무 깁니다:"], tokens: ["tokens", "토큰"], characters: ["characters", "자"],
  failed: ["The model cannot run here:", "여기서는 모델을 실행할 수 없습니다:"],
  parameters: ["parameters", "매개변수"], layers: ["layers", "층"], context: ["tokens of context", "문맥(토큰)"],
  "bits per byte": [, "바이트당 비트"], "word problems": [, "문장제"], identity: [, "자기소개 질문"],
};

const $ = (id) => document.getElementById(id), log = $("log"), box = $("box");
const model = JSON.parse($("model").textContent), { language, message_chars, ...settings } = model.serve;
const t = (name) => TEXTS[name]?.[Number(korean)] ?? name, kind = model.chats ? "" : "_base";
let korean = (language === "auto" ? navigator.language : language).startsWith("ko");
let messages = [], answering = null, ready = false, status = ["loading"]; // of the line below the box

// Return an element; `t` names a text that follows the language.
function element(tag, { t, ...properties }, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  if (t) made.dataset.t = t;
  return made;
}

// ---- worker
const worker = new Worker(URL.createObjectURL(new Blob([$("worker").textContent], { type: "text/javascript" })));
for (const piece of document.querySelectorAll(".piece")) {
  worker.postMessage({ piece: piece.textContent });
  piece.remove();
}
worker.postMessage({ model });
worker.onerror = ({ message }) => worker.onmessage({ data: { failed: message } });
worker.onmessage = ({ data }) => {
  if (data.id) return data.id === answering?.id && data.events.forEach(take);
  ready = Boolean(data.ready);
  say(ready ? ["offline"] : ["!failed", data.failed]);
};

// ---- conversation
function ask(text) {
  if (!ready || answering || !text.trim()) return;
  if (text.length > message_chars) return say(["!too_long", text.length, ">", message_chars, "characters"]);
  $("greeting")?.remove();
  const lines = [element("div", { className: "user" }, text), element("div", { className: "answer" }, "…")];
  log.append(...lines);
  log.scrollTop = log.scrollHeight;
  answering = { id: performance.now(), text, lines, parts: [] };
  worker.postMessage({ id: answering.id, messages: [...messages, { role: "user", content: text }], ...settings });
  box.value = "";
  say([]);
}

function take({ kind, text, ...end }) {
  if (kind === "done") return finish(end);
  const { lines: [, line], parts } = answering, last = parts.at(-1);
  const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  if (!last) line.textContent = "";
  if (last?.type === kind) last.text += text;
  else {
    parts.push({ type: kind, text });
    if (kind === "python_output" && last?.type === "python") text = ` = ${text}`;
    else line.append(document.createElement(kind === "text" ? "span" : "code"));
  }
  line.lastChild.append(text);
  if (follow) log.scrollTop = log.scrollHeight;
}

function finish({ reason, tokens, capacity, dropped, rate }) {
  const { text, lines, parts } = answering;
  answering = null;
  if (reason === "too_long") {
    lines.forEach((line) => line.remove());
    box.value ||= text;
    return say(["!too_long", tokens, ">", capacity, "tokens"]);
  }
  messages = [...messages.slice(dropped), { role: "user", content: text }, { role: "assistant", content: parts }];
  say([...(rate > 0 ? [Math.round(rate), "speed"] : []), ...(dropped ? ["·", "forgotten"] : [])]);
}

const stop = () => answering && worker.postMessage({ stop: true });

// Words are names of texts, numbers, or shown as they are; "!" begins a complaint.
function say(words) {
  const texts = words.map((word) => (typeof word === "number" ? word.toLocaleString() : t(word.replace(/^!/, ""))));
  Object.assign($("status"), { textContent: texts.join(" "), className: words[0]?.[0] === "!" ? "bad" : "" });
  Object.assign($("send"), { textContent: t(answering ? "stop" : "send"), disabled: !ready });
  status = words;
}

function show() {
  [document.documentElement.lang, $("language").lang] = korean ? ["ko", "en"] : ["en", "ko"];
  for (const part of document.querySelectorAll("[data-t]")) part.textContent = t(part.dataset.t);
  [$("kind").textContent, log.ariaLabel] = [t(`kind${kind}`), t("log")];
  box.placeholder = box.ariaLabel = t(`placeholder${kind}`);
  if (!log.children.length || $("greeting")) {
    const examples = model.examples.map((text) => element("button", { type: "button", onclick: () => ask(text) }, text));
    log.replaceChildren(element("div", { id: "greeting" }, t(`greeting${kind}`), element("div", {}, ...examples)));
  }
  say(status);
}

const longest = model.config.seq_len;
settings.max_tokens = Math.min(settings.max_tokens, longest);
for (const [name, min, most, step] of [["temperature", 0, 2, 0.05], ["top_k", 0, 200, 1], ["max_tokens", 1, longest, 1]]) {
  const value = settings[name], number = element("b", {}, value), info = TEXTS[`${name}_info`] ? `${name}_info` : "tokens";
  const range = element("input", { type: "range", min, max: Math.max(most, value), step, value });
  range.oninput = () => (number.textContent = settings[name] = Number(range.value));
  $("settings").append(element("label", {}, element("span", { t: name }), number, range, element("span", { t: info })));
}
for (const [name, value] of Object.entries(model.facts)) $("facts").append(element("dt", { t: name }), element("dd", {}, value));
$("card").textContent = model.card;
$("new").onclick = () => {
  stop();
  [answering, messages] = [null, []];
  if (ready) status = ["offline"];
  log.replaceChildren();
  show();
  box.focus();
};
$("language").onclick = () => show((korean = !korean));
$("form").onsubmit = () => (answering ? stop() : ask(box.value), false); // false: the browser does nothing itself
// Enter ends a Korean syllable first
box.onkeydown = ({ key, shiftKey, isComposing }) => key !== "Enter" || shiftKey || isComposing || (ask(box.value), false);
addEventListener("keydown", ({ key }) => key === "Escape" && stop());
show();
