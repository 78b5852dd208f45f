// The model, in a worker: tokenizer, calculator, forward pass, answers. It does what jaxchat's engine does; functions
// have the names that they have in jaxchat/{tokenizer,chat,model}.py, tools/calculator.py and engine/.
"use strict";

// ---- tokenizer: byte-level BPE
class Tokenizer {
  constructor({ special, splits, normalize, whole_words }, { byte_ids, token_lengths, token_bytes, merges }) {
    Object.assign(this, { special, normalize, byteIds: byte_ids });
    this.splits = splits.map((pattern) => new RegExp(pattern, "gu"));
    let at = 0;
    this.bytes = Array.from(token_lengths, (length) => token_bytes.subarray(at, (at += length)));
    this.words = new Map(whole_words ? this.bytes.map((bytes, id) => [String(bytes), id]) : []); // come before merges
    this.merges = new Map(); // "left right" -> [rank, id of both]
    for (let i = 0; i < merges.length; i += 3) this.merges.set(`${merges[i]} ${merges[i + 1]}`, [i, merges[i + 2]]);
  }

  // Return the ids of a text, never a special one; lone surrogates become U+FFFD.
  encode(text) {
    text = text.replace(/\p{Surrogate}/gu, "\ufffd");
    let pieces = [this.normalize ? text.normalize(this.normalize) : text];
    for (const pattern of this.splits)
      pieces = pieces.flatMap((piece) => {
        const ends = [...piece.matchAll(pattern)].flatMap(({ 0: match, index }) => [index, index + match.length]);
        return [0, ...ends].map((begin, i) => piece.slice(begin, ends[i])).filter(Boolean); // what is between, too
      });
    return pieces.flatMap((piece) => this.merge(new TextEncoder().encode(piece)));
  }

  merge(bytes) {
    const ids = Array.from(bytes, (byte) => this.byteIds[byte]), word = this.words.get(String(bytes));
    if (word !== undefined) return [word];
    const merged = (i) => this.merges.get(`${ids[i]} ${ids[i + 1]}`), found = ids.map((_, i) => merged(i));
    for (let best; ; ) {
      best = -1;
      for (let i = 0; i < ids.length - 1; i++) if (found[i] && !(found[i][0] >= found[best]?.[0])) best = i;
      if (best < 0) return ids;
      ids.splice(best, 2, found[best][1]);
      found.splice(best, 1);
      for (const i of [best - 1, best]) found[i] = merged(i);
    }
  }
}

// ---- calculator: exact fractions [numerator, denominator] of BigInt
const SPACE = /^[\s\x1c-\x1f\x85]+|[\s\x1c-\x1f\x85]+$/g, THOUSANDS = /(?<![\d.,])\d{1,3}(,\d{3})+(?![\d,])/g;
const TOKEN = /'[^'"\\\n]*'|"[^'"\\\n]*"|\d+\.?\d*|\.\d+|\.count|[^ ]/g;
const OPERATIONS = [
  { "+": ([a, b], [c, d]) => [a * d + c * b, b * d], "-": ([a, b], [c, d]) => [a * d - c * b, b * d] },
  { "*": ([a, b], [c, d]) => [a * c, b * d], "/": ([a, b], [c, d]) => (c ? [a * d, b * c] : fail()) },
];
const fail = () => BigInt("not a calculation"); // which throws

// Return the value of an expression as text; null where it is not allowed, not valid or not finite.
function calculate(expression) {
  expression = expression.replace(SPACE, "");
  if ([...expression].length > 200) return null;
  if (!/['"]/.test(expression)) expression = expression.replace(THOUSANDS, (match) => match.replaceAll(",", ""));
  const outside = expression.replace(/'[^'"\\\n]*'|"[^'"\\\n]*"/g, "''");
  if (!/^([0-9+\-/(). ']|\*(?!\*)|\.count)+$/.test(outside) || outside.includes("//")) return null;
  const tokens = expression.match(TOKEN) ?? [], next = (token) => tokens[0] === token && tokens.shift();
  const isText = (value) => /^['"]/.test(value), number = (value) => (typeof value === "string" ? fail() : value);
  function operation(level) {
    const signs = OPERATIONS[level];
    let value = signs ? operation(level + 1) : operand();
    while (signs?.[tokens[0]]) value = signs[tokens.shift()](number(value), number(operation(level + 1)));
    return value;
  }
  function operand() {
    if (next("-")) return OPERATIONS[0]["-"]([0n, 1n], number(operand()));
    let value = "";
    if (isText(tokens[0])) while (isText(tokens[0])) value += tokens.shift().slice(1, -1); // joined, as in Python
    else if (next("(")) [value] = [operation(0), next(")") || fail()];
    else {
      const [, whole, , part = ""] = tokens.shift()?.match(/^(?!0+[1-9]\d*$|\.$)(\d*)(\.(\d*))?$/) ?? fail(); // no 007
      value = [BigInt(whole + part), 10n ** BigInt(part.length)];
    }
    while (next(".count")) {
      const part = next("(") ? operation(0) : fail();
      if (!next(")") || typeof value !== "string" || typeof part !== "string" || !value || !part) fail();
      value = [BigInt(value.split(part).length - 1), 1n];
    }
    return value;
  }
  try {
    const value = number(operation(0));
    return tokens.length ? null : formatNumber(...value);
  } catch {
    return null;
  }
}

// Return a / b with at most 10 significant digits; null outside of the range that is worth writing.
function formatNumber(a, b) {
  const sign = a && a < 0n !== b < 0n ? "-" : "", [top, bottom] = [a, b].map((n) => (n < 0n ? -n : n));
  if (top >= bottom * 10n ** 30n || (top && top * 10n ** 12n < bottom)) return null;
  if (top % bottom === 0n) return sign + top / bottom;
  const large = top * 10n ** 40n, surplus = String(large / bottom).length - 10, unit = bottom * 10n ** BigInt(surplus);
  const rest = 2n * (large % unit) - unit, point = 40 - surplus; // digits behind it
  let digits = large / unit;
  if (rest > 0n || (!rest && digits % 2n)) digits++; // half to even
  if (point <= 0) return sign + digits + "0".repeat(-point);
  const text = String(digits).padStart(point + 1, "0");
  return sign + `${text.slice(0, -point)}.${text.slice(-point)}`.replace(/\.?0+$/, "");
}

// ---- forward pass. Weights: {rows, columns, values: Int8Array, scale: Float32Array (rows)}
// Write weights times x into y. Four sums at a time keep the processor busy.
function multiply(y, x, { rows, columns, values: w, scale }) {
  for (let r = 0, p = 0; r < rows; r++) {
    let a = 0, b = 0, c = 0, d = 0, i = 0;
    for (; i + 3 < columns; i += 4, p += 4) {
      a += x[i] * w[p];
      b += x[i + 1] * w[p + 1];
      c += x[i + 2] * w[p + 2];
      d += x[i + 3] * w[p + 3];
    }
    for (; i < columns; i++, p++) a += x[i] * w[p];
    y[r] = (a + b + c + d) * scale[r];
  }
}

function lookup(y, { columns, values, scale }, row) {
  for (let i = 0; i < columns; i++) y[i] = values[row * columns + i] * scale[row];
  return y;
}

function norm(y, x, eps, factor = 1) {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * x[i];
  const scale = factor / Math.sqrt(sum / x.length + eps);
  for (let i = 0; i < x.length; i++) y[i] = x[i] * scale;
  return y;
}

// Write a * x + b * y into x.
function mix(x, a, y, b) {
  for (let i = 0; i < x.length; i++) x[i] = a * x[i] + b * y[i];
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));

class Model {
  constructor(config, tensors) {
    Object.assign(this, { c: config, t: tensors, ids: [] }); // ids: of the tokens whose keys and values are cached
    const { depth, seq_len, width, n_heads, n_kv_heads, head_width: N } = config, KN = n_kv_heads * N;
    const floats = (size) => new Float32Array(size);
    for (const name of ["x", "x0", "e", "h", "middle", "added"]) this[name] = floats(width);
    [this.q, this.attended, this.fc] = [n_heads * N, n_heads * N, tensors["fc.0"].rows].map(floats);
    [this.k, this.table] = [KN, KN].map(floats);
    [this.scores, this.logits, this.cos, this.sin] = [seq_len, config.vocab_size, N / 2, N / 2].map(floats);
    this.frequency = floats(N / 2).map((_, i) => config.rotary_base ** ((-2 * i) / N));
    // of all positions, so that a prompt can go back to any; a short window only reads its end
    [this.keys, this.values] = [0, 1].map(() => Array.from({ length: depth }, () => floats((seq_len + 1) * KN)));
    const slow = (j) => config.key_offset && j % (N >> 1) >= N >> 2; // is that of the token before
    this.places = Array.from({ length: KN }, (_, j) => (slow(j) ? KN + j : j)); // of a key's numbers, from its position
  }

  // Run one more token; return the logits behind it where they are wanted.
  append(token, wanted) {
    const { c, t, x } = this, position = this.ids.length;
    this.embed(token);
    this.x0.set(x);
    this.frequency.forEach((frequency, i) => {
      const angle = Math.fround(position * frequency); // rounded as the engine's
      [this.cos[i], this.sin[i]] = [Math.cos(angle), Math.sin(angle)];
    });
    for (let i = 0; i < c.depth; i++) {
      this.block(i, token, position);
      if (i === c.depth >> 1) this.middle.set(x);
    }
    this.ids.push(token);
    if (!wanted) return null;
    if (c.backout) mix(x, 1, this.middle, -t.backout_scale[0]);
    multiply(this.logits, norm(x, x, c.norm_eps), t.unembedding ?? t.embedding);
    return this.logits.map((z) => c.softcap * Math.tanh(z / c.softcap));
  }

  // x: the normed embedding, with what the token before adds
  embed(token) {
    const { c, t, x, e } = this, normed = (y, row) => norm(y, lookup(y, t.embedding, row), c.norm_eps);
    normed(x, token);
    const before = this.ids.at(-1) ?? -1, gate = t.smear_gate?.reduce((sum, w, i) => sum + w * x[i], 0);
    if (c.smear && before >= 0) mix(x, 1, normed(e, before), t.smear_scale[0] * sigmoid(gate));
    if (c.bigram_rows > 0) mix(x, 1, lookup(e, t.bigram_embedding, this.bigramRow(before, token)), 1);
  }

  bigramRow(first, second) {
    let mixed = Math.imul(first, 0xc2b2ae35) + Math.imul(second, 0x9e3779b1);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x85ebca6b);
    return ((mixed ^ (mixed >>> 13)) >>> 0) % this.c.bigram_rows;
  }

  block(i, token, position) {
    const { c, t, x, h, q, k, fc, added } = this, N = c.head_width, KN = c.n_kv_heads * N;
    if (c.residual_scalars) mix(x, t.residual_scale[i], this.x0, t.x0_scale[i]);
    norm(h, x, c.norm_eps);
    const keys = this.keys[i], values = this.values[i], v = values.subarray(position * KN, (position + 1) * KN);
    for (const [y, name] of [[q, "q"], [k, "k"], [v, "v"]]) multiply(y, h, t[`${name}.${i}`]);
    if (t[`value_embedding.${i}`]) this.addTable(v, t[`value_embedding.${i}`], token, t[`ve_gate.${i}`]);
    for (const heads of [q, k]) for (let at = 0; at < heads.length; at += N) this.rotate(heads.subarray(at, at + N));
    this.places.forEach((place, j) => (keys[position * KN + place] = k[j]));
    this.attend(keys, values, Math.max(0, position - c.windows[i]), position);
    multiply(added, this.attended, t[`o.${i}`]);
    mix(x, 1, added, 1);
    multiply(fc, norm(h, x, c.norm_eps), t[`fc.${i}`]);
    for (let j = 0; j < fc.length; j++) fc[j] = fc[j] > 0 ? fc[j] * fc[j] : 0;
    multiply(added, fc, t[`proj.${i}`]);
    mix(x, 1, added, 1);
  }

  // Add a row of a table to the values; each kv head has a gate (channels, heads) over the first channels of h.
  addTable(v, table, row, gate) {
    const { n_kv_heads: K, head_width: N } = this.c;
    lookup(this.table, table, row);
    for (let head = 0; head < K; head++) {
      let z = 0;
      for (let i = 0; i * K < gate.length; i++) z += gate[i * K + head] * this.h[i];
      mix(v.subarray(head * N, (head + 1) * N), 1, this.table.subarray(head * N), 3 * sigmoid(z));
    }
  }

  rotate(head) {
    for (let i = 0, half = head.length / 2; i < half; i++) {
      const a = head[i], b = head[i + half];
      head[i] = a * this.cos[i] + b * this.sin[i];
      head[i + half] = b * this.cos[i] - a * this.sin[i];
    }
    norm(head, head, this.c.norm_eps, this.c.qk_scale);
  }

  attend(keys, values, first, last) {
    const { q, scores, attended } = this, { n_heads, n_kv_heads, head_width: N } = this.c, KN = n_kv_heads * N;
    attended.fill(0);
    for (let head = 0; head < n_heads; head++) {
      const own = head * N, shared = Math.floor((head * n_kv_heads) / n_heads) * N;
      let highest = -Infinity, total = 0;
      for (let p = first; p <= last; p++) {
        let sum = 0;
        for (let i = 0, at = p * KN + shared; i < N; i++) sum += q[own + i] * keys[at + i];
        highest = Math.max(highest, (scores[p] = sum / Math.sqrt(N)));
      }
      for (let p = first; p <= last; p++) total += scores[p] = Math.exp(scores[p] - highest);
      for (let p = first; p <= last; p++)
        for (let i = 0, at = p * KN + shared; i < N; i++) attended[own + i] += (scores[p] / total) * values[at + i];
    }
  }
}

// Return the next token: the likeliest at temperature 0, else a draw among the top_k (0: all), ties included.
function sample(logits, temperature, topK, random = Math.random) {
  const highest = logits.reduce((a, b) => Math.max(a, b));
  if (temperature <= 0) return logits.indexOf(highest);
  const least = topK > 0 && topK < logits.length ? logits.slice().sort().at(-topK) : -Infinity;
  const p = logits.map((z) => (z >= least ? Math.exp((z - highest) / Math.max(temperature, 1e-4)) : 0));
  let left = random() * p.reduce((a, b) => a + b);
  const token = p.findIndex((share) => (left -= share) < 0);
  return token < 0 ? logits.indexOf(highest) : token;
}

// ---- answers
const FORCED = 64, ANSWER_ROOM = 32; // tokens of a tool's result with its marks; of the context, kept for the answer
const FRAMES = { python: "python", python_output: "output" }; // marks around a part

class Chat {
  constructor({ config, tokenizer, chats }, tensors) {
    Object.assign(this, { chats, tokenizer: new Tokenizer(tokenizer, tensors), model: new Model(config, tensors) });
    this.special = (name) => tokenizer.special[`<|${name}|>`];
    this.ends = ["assistant_end", "user_start", "bos"].map(this.special);
  }

  // Return the ids to continue. Messages: {role, content}, an assistant's content being parts {type, text}.
  render(messages) {
    const { special } = this, encode = (text) => this.tokenizer.encode(text);
    const parts = ({ role, content }) => (role === "user" ? [{ type: "text", text: content }] : content);
    const framed = (name, ids) => (name ? [special(`${name}_start`), ...ids, special(`${name}_end`)] : ids);
    if (!this.chats) return [special("bos"), ...encode(messages.flatMap(parts).map(({ text }) => text).join(""))];
    const turn = (message) => parts(message).flatMap(({ type, text }) => framed(FRAMES[type], encode(text)));
    const turns = messages.flatMap((message) => framed(message.role, turn(message)));
    return [special("bos"), ...turns, special("assistant_start")];
  }

  // Yield {kind, text} events, {kind: "done"} last, and null after each token, where `stopped` is asked.
  *answer({ messages, ...settings }, stopped = () => false) {
    const capacity = this.model.c.seq_len, room = capacity - Math.min(ANSWER_ROOM, capacity >> 1);
    let dropped = 0, prompt = this.render(messages);
    while (prompt.length > room && dropped < messages.length - 1) prompt = this.render(messages.slice((dropped += 2)));
    if (prompt.length > capacity) return yield { kind: "done", reason: "too_long", tokens: prompt.length, capacity };
    const turn = new Turn(this.tokenizer);
    let made = 0, reason = "stop", begun;
    for (const token of this.tokens(prompt, settings)) {
      if (token >= 0) {
        if (!made++) begun = performance.now();
        yield* turn.add(token);
        if (this.chats && token === this.special("python_end")) this.forced = turn.toolOutput();
      } else if (token < 0) reason = "length";
      yield null;
      if (stopped()) break;
    }
    yield* turn.flush();
    yield { kind: "done", reason, dropped, rate: (1000 * (made - 1)) / (performance.now() - begun) };
  }

  // Yield ids, NaN for each token of the prompt, and -1 last where a limit ends the answer.
  *tokens(prompt, { temperature, top_k, max_tokens }) {
    const { model } = this, limit = Math.min(model.c.seq_len + 1 - prompt.length, max_tokens), last = prompt.at(-1);
    let same = 0; // tokens that are cached from the turn before
    while (same < prompt.length - 1 && prompt[same] === model.ids[same]) same++;
    model.ids.length = same;
    for (const token of prompt.slice(same, -1)) {
      model.append(token, false);
      yield NaN;
    }
    this.forced = [];
    for (let made = 1, token = last; ; made++) {
      const logits = model.append(token, !this.forced.length);
      token = logits ? sample(logits, temperature, top_k) : this.forced.shift();
      if (logits && this.ends.includes(token)) return;
      yield token;
      if (made >= limit) return yield -1;
    }
  }
}

// An answer as its ids come in: parts of text, calls of the calculator and their results.
class Turn {
  constructor(tokenizer) {
    this.names = new Map(Object.entries(tokenizer.special).map(([name, id]) => [id, name]));
    Object.assign(this, { tokenizer, kind: "text", parts: [], decoder: new TextDecoder("utf-8", { ignoreBOM: true }) });
  }

  // Return the events that an id completes. A special token never shows as text.
  add(token) {
    const name = this.names.get(token), bytes = this.tokenizer.bytes[token] ?? new Uint8Array();
    if (!name) return this.show(this.decoder.decode(bytes, { stream: true }));
    const opened = Object.keys(FRAMES).find((kind) => name === `<|${FRAMES[kind]}_start|>`);
    if (!opened && name !== `<|${FRAMES[this.kind]}_end|>`) return [];
    const events = this.flush();
    this.kind = opened ?? "text";
    if (opened) this.parts.push({ type: opened, text: "" });
    return events;
  }

  flush = () => this.show(this.decoder.decode());
  show(text) {
    if (!text) return [];
    if (this.parts.at(-1)?.type !== this.kind) this.parts.push({ type: this.kind, text: "" });
    this.parts.at(-1).text += text;
    return [{ kind: this.kind, text }];
  }

  // Return the ids that answer the call just closed; [] where there was none.
  toolOutput() {
    const { special } = this.tokenizer, call = this.parts.at(-1);
    if (call?.type !== "python") return [];
    const ids = this.tokenizer.encode(calculate(call.text) ?? "error").slice(0, FORCED - 2);
    return [special["<|output_start|>"], ...ids, special["<|output_end|>"]];
  }
}

// ---- the file
const TYPES = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };

// Return an array, or weights, for every {name: [type, offset, rows, columns]}, from base64 of `size` bytes in pieces.
function readTensors(table, pieces, size) {
  const bytes = new Uint8Array(size);
  let at = 0;
  while (pieces.length) {
    const text = atob(pieces.shift());
    for (let i = 0; i < text.length; i++) bytes[at++] = text.charCodeAt(i);
  }
  if (at !== size) throw new Error(`the file is not whole: ${at} of ${size} bytes`);
  const tensor = ([type, at, rows, columns]) => {
    if (type !== "int8") return new TYPES[type](bytes.buffer, at, rows * columns);
    const values = new Int8Array(bytes.buffer, at + 4 * rows, rows * columns);
    return { rows, columns, values, scale: tensor(["float32", at, 1, rows]) };
  };
  return Object.fromEntries(Object.entries(table).map(([name, entry]) => [name, tensor(entry)]));
}

// ---- the worker. In come {piece} of the file, {model} once they are all there, {id, messages, ...settings} to answer
// and {stop}; out go {ready}, {failed} and {id, events}.

const pieces = [];
let chat, job;

async function run({ id, ...request }) {
  let events = [], last = performance.now();
  job = id;
  for (const event of chat.answer(request, () => job !== id)) {
    if (event) events.push(event);
    if (event ? event.kind !== "done" : performance.now() - last < 50) continue; // ms; then other messages are read
    if (events.length) postMessage({ id, events });
    await new Promise((resolve) => setTimeout(resolve));
    [events, last] = [[], performance.now()];
  }
}

globalThis.onunhandledrejection = ({ reason }) => postMessage({ failed: String(reason) }); // out of memory, for one
globalThis.onmessage = async ({ data: { piece, model, stop, ...request } }) => {
  if (piece) return pieces.push(piece);
  if (stop) return (job = null);
  if (!model) return run(request);
  chat = new Chat(model, readTensors(model.tensors, pieces, model.bytes));
  postMessage({ ready: true });
};
