/* Search, filter and sort the scoreboard. Without this script the page shows every claim in the order of the book. */

(() => {
  "use strict";

  const VERDICTS = ["reproduced", "partly", "not reproduced", "out of reach here", "planned"];
  const TESTED = { exact: "counted at full size", "full-size": "measured at full size", scaled: "scaled down" };
  const ORDERS = { book: "the book", paper: "paper", verdict: "verdict", claim: "claim" };

  const place = document.getElementById("lt-score-controls");
  const tables = [...document.querySelectorAll("table.lt-scoreboard")];
  if (!place || !tables.length) return;

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };

  const labelled = (text, control) => element("label", { className: "lt-control" }, element("span", { textContent: text }), control);

  const choice = (pairs) => {
    const list = element("select");
    list.append(...pairs.map(([value, text]) => element("option", { value, textContent: text })));
    return list;
  };

  const search = element("input", { type: "search", autocomplete: "off" });
  const verdict = choice([["", "all"], ...VERDICTS.map((v) => [v, v])]);
  const tested = choice([["", "any way"], ...Object.entries(TESTED)]);
  const order = choice(Object.entries(ORDERS));
  const headline = element("input", { type: "checkbox" });
  const count = element("p", { className: "lt-count" });
  count.setAttribute("role", "status");

  place.append(
    element(
      "form",
      { className: "lt-controls", onsubmit: () => false },
      labelled("Search", search),
      labelled("Verdict", verdict),
      labelled("Tested", tested),
      labelled("In the order of", order),
      labelled("Headline claims only", headline),
    ),
    count,
  );

  // One entry a claim; a planned paper is one entry too, of its one row.
  const entries = [];
  for (const body of document.querySelectorAll("table.lt-scoreboard > tbody")) {
    const [head, ...claims] = body.rows;
    const paper = head.querySelector(".lt-paper-name");
    for (const row of claims.length ? claims : [head]) {
      entries.push({
        row,
        body,
        paper: paper.textContent,
        link: paper,
        claim: claims.length ? row.cells[0].textContent : "",
        verdict: row.dataset.verdict ?? "planned",
        tested: row.dataset.tested ?? "",
        headline: "headline" in row.dataset,
        text: `${head.textContent} ${row.textContent}`.toLowerCase(),
        planned: !claims.length,
      });
    }
  }

  const names = tables.map((table) => table.tHead).find(Boolean);
  const flat = tables[0].cloneNode(false);
  flat.hidden = true;
  if (names) flat.append(names.cloneNode(true));
  flat.prepend(element("caption", { textContent: "All claims, sorted" }));
  tables[0].closest("section").before(flat);

  const wanted = (entry) =>
    search.value.toLowerCase().split(/\s+/).every((word) => entry.text.includes(word)) &&
    (!verdict.value || entry.verdict === verdict.value) &&
    (!tested.value || entry.tested === tested.value) &&
    (!headline.checked || entry.headline);

  const compare = {
    paper: (a, b) => a.paper.localeCompare(b.paper),
    verdict: (a, b) => VERDICTS.indexOf(a.verdict) - VERDICTS.indexOf(b.verdict) || a.paper.localeCompare(b.paper),
    claim: (a, b) => a.claim.localeCompare(b.claim),
  };

  const showSorted = (shown) => {
    const body = element("tbody");
    body.setAttribute("role", "rowgroup");
    for (const entry of [...shown].filter((e) => !e.planned).sort(compare[order.value])) {
      const row = entry.row.cloneNode(true);
      row.hidden = false;
      const name = entry.link.cloneNode(true);
      row.cells[0].prepend(name, " ");
      body.append(row);
    }
    flat.tBodies[0]?.remove();
    flat.append(body);
  };

  const update = () => {
    const shown = new Set(entries.filter(wanted));
    const grouped = order.value === "book";
    for (const entry of entries) entry.row.hidden = !shown.has(entry);
    for (const table of tables) {
      const section = table.closest("section");
      for (const body of table.tBodies) {
        body.hidden = !entries.some((entry) => entry.body === body && shown.has(entry));
      }
      section.hidden = !grouped || [...table.tBodies].every((body) => body.hidden);
    }
    flat.hidden = grouped;
    if (!grouped) showSorted(shown);
    const claims = [...shown].filter((entry) => !entry.planned).length;
    const planned = shown.size - claims;
    count.textContent = `${claims} of ${entries.filter((e) => !e.planned).length} claims` +
      (planned && grouped ? ` and ${planned} planned ${planned === 1 ? "paper" : "papers"}` : "");
  };

  for (const control of [search, verdict, tested, order, headline]) control.addEventListener("input", update);
  update();
})();
