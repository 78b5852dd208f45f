// The table of alternatives beside a token of an answer: one for the whole page, filled with text nodes only.
(() => {
  const tip = Object.assign(document.createElement("div"), { id: "tip", hidden: true, role: "tooltip" });
  const percent = (p) => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;

  function table([text, p, top]) {
    const element = document.createElement("table");
    for (const [other, q] of top.some(([other]) => other === text) ? top : [...top, [text, p]]) {
      const row = element.insertRow();
      row.className = other === text ? "taken" : "";
      for (const [name, content] of Object.entries({ text: other, bar: "", number: percent(q) }))
        Object.assign(row.insertCell(), { className: name, textContent: content }).style.setProperty("--p", q);
    }
    return element;
  }

  function show(token) {
    document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
    tip.hidden = !token || !document.querySelector("#probabilities input")?.checked;
    if (tip.hidden) return;
    token.setAttribute("aria-describedby", "tip");
    tip.replaceChildren(...JSON.parse(token.dataset.steps).map(table));
    (document.querySelector(".gradio-container") ?? document.body).append(tip);
    const at = token.getClientRects()[0], { width, height } = tip.getBoundingClientRect();
    const below = at.bottom + 6, above = at.top - height - 6;
    tip.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8))}px`;
    tip.style.top = `${below + height < innerHeight || above < 0 ? below : above}px`;
  }

  const token = (event) => event.target.closest?.(".token");
  for (const kind of ["pointerover", "focusin", "click"]) addEventListener(kind, (event) => show(token(event)));
  addEventListener("scroll", () => show(), true);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") show();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !token(event)) return;
    const all = [...document.querySelectorAll("#chat .token")];
    all[all.indexOf(token(event)) + step]?.focus();
    event.preventDefault();
  });

  // names for what Gradio leaves without one; LABELS comes from page.toml
  const [send, stop, log, copy] = LABELS[navigator.language.startsWith("ko") ? "ko" : "en"];
  const names = [["#box .submit-button", send], ["#box .stop-button", stop], ["#chat [role=log]", log],
    ["#chat button[title='Copy message']", copy]];
  new MutationObserver(() => {
    for (const [selector, name] of names)
      for (const element of document.querySelectorAll(`${selector}:not([aria-label="${name}"])`)) {
        element.setAttribute("aria-label", name);
        if (element.title) element.title = name;
      }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
