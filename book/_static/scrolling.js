// Boxes that scroll can be reached by keyboard. The theme sees to it too, but looks once, perhaps before the layout is done.
window.addEventListener("load", () => {
  const boxes = ".cell_output > .output, .highlight pre";
  const watch = new ResizeObserver((seen) => {
    for (const { target } of seen) {
      const box = target.closest(boxes);
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  });
  for (const box of document.querySelectorAll(boxes)) {
    for (const part of [box, ...box.children]) watch.observe(part);
  }
});
