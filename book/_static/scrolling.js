// Boxes that scroll can be reached by keyboard. The theme sees to it too, but looks once, perhaps before the layout is done.
window.addEventListener("load", () => {
  const boxes = ".cell_output > .output, .highlight pre";
  const watch = new ResizeObserver((seen) => {
    for (const { target } of seen) {
      const box = target.closest(boxes);
      if (box && box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  });
  document.querySelectorAll(`${boxes}, .cell_output > .output > *`).forEach((part) => watch.observe(part));
});
