// Formulas: \(…\) and \[…\] where Markdown marked them (pymdownx.arithmatex), and $…$ and $$…$$ in notebooks, whose
// headings are in the table of contents as well.
const delimiters = [
  { left: "$$", right: "$$", display: true },
  { left: "\\[", right: "\\]", display: true },
  { left: "$", right: "$", display: false },
  { left: "\\(", right: "\\)", display: false },
]
document.addEventListener("DOMContentLoaded", () => {
  const notebook = document.querySelector(".jupyter-wrapper") !== null
  const where = notebook ? ".jp-RenderedMarkdown, .md-nav--secondary" : ".arithmatex"
  for (const element of document.querySelectorAll(where)) {
    renderMathInElement(element, { delimiters, throwOnError: false })
  }
})
