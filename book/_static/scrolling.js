// Boxes that scroll can be reached by keyboard. The theme sees to most, once, before the layout is done, and not to the
// outputs that stand in figures.
window.addEventListener("load", () => {
  const boxes = ".output.text_html, .highlight pre";
  const watch = new ResizeObserver((seen) => {
    for (const { target } of seen) {
      const box = target.closest(boxes);
      if (box && box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  });
  document.querySelectorAll(`${boxes}, .output.text_html > *`).forEach((part) => watch.observe(part));
});
