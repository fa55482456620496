for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement, body = header.closest("table").tBodies[0];
    const down = header.getAttribute("aria-sort") !== "descending";
    for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[header.cellIndex].dataset.value ?? row.cells[header.cellIndex].textContent;
    const order = (a, b) => value(a).localeCompare(value(b), "en", { numeric: true }) * (down ? -1 : 1);
    body.append(...[...body.rows].sort(order));
  });
}
