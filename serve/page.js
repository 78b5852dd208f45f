// The table of alternatives beside a token of an answer: one for the whole page, filled with text nodes only.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "tooltip");
  let owner = null;

  const cell = (row, text, name) => Object.assign(row.insertCell(), { textContent: text, className: name ?? "" });
  const percent = (p) => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;

  function table([text, p, top]) {
    const rows = top.some(([other]) => other === text) ? top : [...top, [text, p]];
    const element = document.createElement("table");
    for (const [other, q] of rows) {
      const row = element.insertRow();
      row.className = other === text ? "taken" : "";
      cell(row, other, "text");
      cell(row, "", "bar").style.setProperty("--p", q);
      cell(row, percent(q), "number");
    }
    return element;
  }

  function hide() {
    owner?.removeAttribute("aria-describedby");
    owner = null;
    tip.hidden = true;
  }

  function show(token) {
    if (token === owner) return;
    hide();
    if (!document.querySelector("#probabilities input")?.checked) return;
    owner = token;
    token.setAttribute("aria-describedby", "tip");
    tip.replaceChildren(...JSON.parse(token.dataset.steps).map(table));
    tip.hidden = false;
    (document.querySelector(".gradio-container") ?? document.body).append(tip);
    const at = token.getClientRects()[0], { width, height } = tip.getBoundingClientRect();
    const below = at.bottom + 6, above = at.top - height - 6;
    tip.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8))}px`;
    tip.style.top = `${below + height < innerHeight || above < 0 ? below : above}px`;
  }

  const token = (event) => event.target.closest?.(".token");
  for (const kind of ["pointerover", "focusin", "click"])
    document.addEventListener(kind, (event) => (token(event) ? show(token(event)) : hide()));
  addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !token(event)) return;
    const all = [...document.querySelectorAll("#chat .token")];
    all[all.indexOf(token(event)) + step]?.focus();
    event.preventDefault();
  });

  // names for what Gradio leaves without one; LABELS comes from texts.py
  const name = (selector, text) => document.querySelectorAll(selector).forEach((e) => e.setAttribute("aria-label", text));
  const [send, stop, log, copy] = LABELS[navigator.language.startsWith("ko") ? "ko" : "en"];
  new MutationObserver(() => {
    name("#box .submit-button:not([aria-label])", send);
    name("#box .stop-button:not([aria-label])", stop);
    name(`#chat [role=log]:not([aria-label="${log}"])`, log);
    for (const button of document.querySelectorAll(`#chat button[title="Copy message"]`)) {
      button.title = copy;
      button.setAttribute("aria-label", copy);
    }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
