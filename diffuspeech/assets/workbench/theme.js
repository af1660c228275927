// What all pages of the workbench share: is the page that they stand in dark?

function isDark(el) {
  const body = document.body.dataset,
    html = document.documentElement
  if (body.jpThemeLight) return body.jpThemeLight === "false"
  if (body.vscodeThemeKind) return body.vscodeThemeKind.includes("dark")
  const named = html.dataset.bsTheme || html.dataset.theme || html.getAttribute("theme")
  if (named === "dark" || named === "light") return named === "dark"
  for (let at = el; at; at = at.parentElement) {
    const [r, g, b, a = 1] = (getComputedStyle(at).backgroundColor.match(/[\d.]+/g) || [0, 0, 0, 0]).map(
      Number,
    )
    if (a > 0.5) return 0.3 * r + 0.59 * g + 0.11 * b < 128
  }
  return matchMedia("(prefers-color-scheme: dark)").matches
}
