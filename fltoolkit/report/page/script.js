"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const details = JSON.parse(one("#details").textContent);
  const tip = one("#tip");
  const points = all("a.point");
  let shown = null;
  let leaving = 0;

  function element(tag, text) {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  }

  function show(point) {
    clearTimeout(leaving);
    if (shown === point) return;
    if (shown) shown.classList.remove("active");
    shown = point;
    point.classList.add("active");
    const { label, threat, rows } = details[point.dataset.point];
    const list = document.createElement("dl");
    for (const [name, value] of rows) {
      list.append(element("dt", name), element("dd", value));
    }
    const head = element("p", label);
    head.append(element("span", threat));
    tip.replaceChildren(head, list);
    tip.hidden = false;
    settle(point);
  }

  function settle(point) {
    const mark = point.querySelector(".marker").getBoundingClientRect();
    const { width, height } = tip.getBoundingClientRect();
    const { clientWidth, clientHeight } = document.documentElement;
    const within = (value, most) => Math.max(8, Math.min(value, most - 8));
    const middle = { x: mark.left + mark.width / 2, y: mark.top + mark.height / 2 };
    let x = within(middle.x - width / 2, clientWidth - width);
    let y = mark.top - height - 14 < 8 ? mark.bottom + 14 : mark.top - height - 14;
    if (clientWidth > 2 * width) {
      x = middle.x + 22 + width < clientWidth ? middle.x + 22 : middle.x - 22 - width;
      y = within(middle.y - height / 2, clientHeight - height);
    }
    tip.style.left = `${x}px`;
    tip.style.top = `${y}px`;
  }

  function hide() {
    clearTimeout(leaving);
    if (shown) shown.classList.remove("active");
    shown = null;
    tip.hidden = true;
  }

  function hideSoon() {
    clearTimeout(leaving);
    leaving = setTimeout(hide, 160);
  }

  function nearest(panel, event) {
    let best = null;
    let least = 22;
    for (const point of all("a.point", panel)) {
      const box = point.querySelector(".marker").getBoundingClientRect();
      const far = Math.hypot(
        box.left + box.width / 2 - event.clientX,
        box.top + box.height / 2 - event.clientY,
      );
      if (far < least) [best, least] = [point, far];
    }
    return best;
  }

  const place = (point) => {
    const box = point.querySelector(".marker").getBoundingClientRect();
    return [box.left + box.width / 2, -(box.top + box.height / 2)];
  };

  function step(point, key) {
    const along = key === "ArrowLeft" || key === "ArrowRight" ? 0 : 1;
    const order = all("a.point", point.closest("svg"));
    order.sort((a, b) => place(a)[along] - place(b)[along]);
    const forward = key === "ArrowRight" || key === "ArrowUp" ? 1 : -1;
    const next = order[order.indexOf(point) + forward];
    if (next) next.focus();
  }

  function select(row) {
    for (const other of all("tr.chosen")) other.classList.remove("chosen");
    if (row) row.classList.add("chosen");
  }

  for (const panel of all("svg.panel")) {
    const title = one("title", panel);
    panel.removeAttribute("aria-labelledby");
    panel.setAttribute("aria-label", title.textContent);
    title.remove();
    panel.addEventListener("pointermove", (event) => {
      const found = nearest(panel, event);
      if (found) show(found);
      else if (shown && !shown.matches(":focus")) hideSoon();
    });
    panel.addEventListener("pointerleave", hideSoon);
  }
  tip.addEventListener("pointerenter", () => clearTimeout(leaving));
  tip.addEventListener("pointerleave", hideSoon);

  for (const point of points) {
    point.addEventListener("focus", () => show(point));
    point.addEventListener("blur", hide);
    point.addEventListener("click", () => {
      hide();
      arrive(point.getAttribute("href"));
    });
    point.addEventListener("keydown", (event) => {
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      step(point, event.key);
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });
  addEventListener("scroll", () => shown && (shown.matches(":focus") ? settle(shown) : hide()), { passive: true });
  addEventListener("resize", hide);

  const rows = all("tbody tr");
  const filters = all(".filter button");

  function filter(threat) {
    let count = 0;
    for (const row of rows) {
      row.hidden = threat !== "" && row.dataset.threat !== threat;
      if (!row.hidden) count += 1;
    }
    for (const button of filters) {
      button.setAttribute("aria-pressed", String(button.dataset.threat === threat));
    }
    one("#count").textContent = `${count} of ${rows.length} lines`;
  }

  for (const button of filters) button.addEventListener("click", () => filter(button.dataset.threat));
  one(".filter").hidden = false;
  filter("");

  function compare(a, b, number) {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (!number) return a.localeCompare(b);
    const [x, y] = [Number(a), Number(b)];
    return x === y ? 0 : x - y;
  }

  function sort(head, column) {
    const up = head.getAttribute("aria-sort") !== "ascending";
    const number = head.dataset.kind === "number";
    const value = (row) => row.children[column].dataset.value;
    const ordered = all("tbody tr").sort((a, b) => {
      const missing = value(a) === "" || value(b) === "";
      const order = compare(value(a), value(b), number);
      return up || missing ? order : -order;
    });
    one("tbody").append(...ordered);
    for (const other of all("thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  }

  all("thead th").forEach((head, column) => {
    const text = one(".head", head);
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text.textContent;
    text.replaceWith(button);
    button.addEventListener("click", () => sort(head, column));
  });

  function arrive(hash) {
    const target = hash.length > 1 ? document.getElementById(hash.slice(1)) : null;
    if (!target) return;
    if (target.matches("tr")) {
      if (target.hidden) filter("");
      select(target);
      setTimeout(() => target.focus({ preventScroll: true }));
    } else if (target.matches("a.point")) {
      setTimeout(() => target.focus({ preventScroll: true }));
    }
  }
  for (const link of all('a[href^="#row-"], a[href^="#point-"]')) {
    if (!link.matches(".point")) link.addEventListener("click", () => arrive(link.getAttribute("href")));
  }
  addEventListener("hashchange", () => arrive(location.hash));
  arrive(location.hash);

  const theme = one("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  function name() {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
    theme.removeAttribute("aria-pressed");
  }
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  theme.hidden = false;
  name();
})();
