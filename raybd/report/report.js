// What the report does beyond what it shows: settings beside a point, a trial's trajectory, tables that sort.
// Without it points have their settings as a tooltip and trajectories show under the pointer. All texts come from the
// page, and are put back as texts.
"use strict";
(() => {
  const make = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const trials = [...document.querySelectorAll("g.trial")];
  const labels = new Map();
  for (const trial of trials) {
    const title = trial.querySelector("title");
    labels.set(trial, title.textContent);
    trial.setAttribute("aria-label", title.textContent);
    title.remove(); // the browser's own tooltip would lie over ours
  }
  const parts = (dot) => dot.getAttribute("data-p").split("|");
  const sentence = ([epoch, top1, asr]) => `epoch ${epoch}: accuracy ${top1} %, ASR ${asr} %`;

  const tip = document.body.appendChild(make("div", "", "tip"));
  tip.hidden = true;
  const show = (trial, dot) => {
    const box = (dot || trial).getBoundingClientRect();
    tip.replaceChildren(make("b", labels.get(trial)));
    if (dot) tip.append(make("div", sentence(parts(dot))));
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(box.right + 10, room))}px`;
    const below = box.bottom + 8;
    const fits = below + tip.offsetHeight < window.innerHeight;
    tip.style.top = `${fits ? below : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
  };
  const hide = () => { tip.hidden = true; };

  let chosen = null;
  const course = (number) => {
    const own = trials.find((trial) => trial.dataset.trial === number && trial.querySelector("circle"));
    if (!own) return [];
    const table = make("table");
    const head = table.appendChild(make("thead")).appendChild(make("tr"));
    for (const name of ["epoch", "accuracy %", "ASR %"]) head.append(make("th", name, "n"));
    const body = table.appendChild(make("tbody"));
    for (const dot of own.querySelectorAll("circle")) {
      const row = body.appendChild(make("tr"));
      for (const cell of parts(dot)) row.append(make("td", cell, "n"));
    }
    const scroll = make("div", undefined, "scroll");
    scroll.append(table);
    return [make("b", labels.get(own)), scroll];
  };
  const choose = (number) => {
    chosen = chosen === number ? null : number;
    for (const trial of trials) trial.classList.toggle("chosen", trial.dataset.trial === chosen);
    for (const row of document.querySelectorAll("tr[data-trial]")) {
      row.classList.toggle("chosen", row.dataset.trial === chosen);
    }
    const detail = document.getElementById("trial-detail");
    if (detail) detail.replaceChildren(...(chosen === null ? [] : course(chosen)));
  };
  for (const trial of trials) {
    const over = (event) => show(trial, event.target.closest("circle"));
    trial.addEventListener("pointerover", over);
    trial.addEventListener("focusin", over);
    trial.addEventListener("pointerout", hide);
    trial.addEventListener("focusout", hide);
    trial.addEventListener("click", () => choose(trial.dataset.trial));
    trial.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose(trial.dataset.trial);
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    hide();
    if (document.activeElement && document.activeElement.closest("g.trial")) document.activeElement.blur();
    if (chosen !== null) choose(chosen);
  });
  const drawn = new Set(trials.map((trial) => trial.dataset.trial)); // of many trials only those on a front
  for (const row of document.querySelectorAll("tr[data-trial]")) {
    if (!drawn.has(row.dataset.trial)) continue;
    const cell = row.querySelector("td.who");
    const button = make("button", cell.textContent);
    button.title = "show its trajectory in the figures";
    button.addEventListener("click", () => choose(row.dataset.trial));
    cell.replaceChildren(button);
  }

  // A cell is compared by its first number in a column of numbers, where a dash is last, and else by its text: also an
  // id, whose digits belong to a word.
  const first = /(?:^|[^\w-])(-?\d[\d.\u202f]*(?:e-?\d+)?)/;
  const number = (cell) => parseFloat((first.exec(cell.textContent) || ["", "NaN"])[1].replaceAll("\u202f", ""));
  const by_text = (one, other) => one.textContent.trim().localeCompare(other.textContent.trim(), "en", { numeric: true });
  const compare = (numeric, sign) => (one, other) => {
    const [a, b] = [number(one), number(other)];
    if (!numeric || (Number.isNaN(a) && Number.isNaN(b))) return sign * by_text(one, other);
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return sign * (a - b);
  };
  const sort = (table, head) => {
    const place = Number(head.dataset.c ?? head.cellIndex);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = compare(head.classList.contains("n"), up ? 1 : -1);
    const body = table.tBodies[0];
    const rows = [...body.rows].filter((row) => !row.classList.contains("base"));
    body.append(...rows.sort((one, other) => order(one.cells[place], other.cells[place])));
  };
  for (const table of document.querySelectorAll("table.sort")) {
    for (const head of table.tHead.querySelectorAll("th:not(.g)")) {
      const button = make("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, head));
    }
  }
})();
