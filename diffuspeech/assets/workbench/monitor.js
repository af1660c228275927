// A training run, watched: its curves, its log, its samples; started, stopped and resumed from here.

const LIGHT = { ink: "#1f2328", soft: "#5d646d", line: "rgba(31,35,40,.16)", train: "#8a9099", best: "#0072b2" }
const DARK = { ink: "#e6e6e6", soft: "#a3a9b3", line: "rgba(230,230,230,.2)", train: "#a3a9b3", best: "#56b4e9" }

const PAGE = `
  <div class="ds-row ds-head">
    <label>run <select class="ds-runs"></select></label>
    <span class="ds-status" role="status" aria-live="polite"></span>
    <button class="ds-stop" title="finish this step, write a checkpoint, end">stop</button>
    <button class="ds-resume" title="go on from the last checkpoint">resume</button>
  </div>
  <div class="ds-readout ds-soft"></div>
  <div class="ds-stage"><canvas role="img"></canvas></div>
  <div class="ds-row ds-hear"><label>validation sample <select class="ds-samples"></select></label><audio controls preload="none"></audio></div>
  <pre class="ds-tail" aria-label="the end of what the run printed"></pre>
  <div class="ds-message" role="alert"></div>
  <details class="ds-new"><summary>New run</summary>
    <div class="ds-row">
      <label>preset <input class="ds-preset" list="ds-presets" size="20"><datalist id="ds-presets"></datalist></label>
      <label>folder <input class="ds-folder" size="20"></label>
      <label>device <select class="ds-device"><option>auto</option><option>cpu</option><option>cuda</option></select></label>
      <label>processes <input class="ds-processes" type="number" min="1" step="1" placeholder="GPUs"
        title="one for each GPU that is found, when left empty"></label>
      <label class="ds-places">where <select class="ds-where"><option>here</option><option>Slurm</option></select></label>
    </div>
    <div class="ds-row ds-slurm"><label class="ds-wide">Slurm options <input class="ds-queue"
      value="timeout_min=60 cpus_per_task=8" placeholder="timeout_min=60 slurm_partition=gpu"></label></div>
    <div class="ds-row"><label class="ds-wide">changes <input class="ds-changes" placeholder="steps=100 model.dim=64"></label>
      <button class="ds-plan">plan</button><button class="ds-start">start</button></div>
    <div class="ds-planned ds-soft" aria-live="polite"></div>
  </details>`

function ticks(low, high, most) {
  // round numbers between two others, not more than so many
  const raw = (high - low) / most,
    power = 10 ** Math.floor(Math.log10(raw)),
    step = [1, 2, 5, 10].find(m => m * power >= raw) * power,
    found = []
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v)
  return found
}

function logTicks(low, high) {
  // 1, 2 and 5 in each decade, or the decades alone
  const every = high - low > 2.5 ? [1] : [1, 2, 5],
    found = []
  for (let k = Math.floor(low); k <= high; k++)
    for (const m of every) if (Math.log10(m) + k >= low && Math.log10(m) + k <= high) found.push(m * 10 ** k)
  return found
}

const short = x => {
  const size = Math.abs(x)
  return size && (size >= 10_000 || size < 0.001) ? x.toExponential(1) : `${Number(x.toPrecision(3))}`
}

class Monitor {
  constructor(el, model) {
    this.model = model
    this.root = document.createElement("div")
    this.root.className = "ds-player ds-monitor"
    this.root.dataset.lmSuppressShortcuts = "true"
    this.root.innerHTML = PAGE
    el.replaceChildren(this.root)
    const on = (name, event, f) => this.$(name).addEventListener(event, f)
    const send = type => () => this.model.send({ type })
    on("stop", "click", send("stop"))
    on("resume", "click", send("resume"))
    on("runs", "change", () => this.model.send({ type: "select", folder: this.$("runs").value }))
    on("samples", "change", () => this.listen())
    for (const kind of ["plan", "start"]) on(kind, "click", () => this.model.send({ type: kind, ...this.form() }))
    const presets = this.model.get("presets")
    this.root.querySelector("datalist").append(...presets.map(name => new Option(name)))
    this.$("preset").value = presets[0] || ""
    this.$("new").open = !this.model.get("data").folder
    on("preset", "input", () => this.name())
    const places = () => (this.$("slurm").style.display = this.$("where").value === "Slurm" ? "" : "none")
    on("where", "change", places)
    this.$("places").style.display = this.model.get("slurm") ? "" : "none"
    places()
    this.name()
    this.model.on("change:data", () => this.show())
    this.model.on("msg:custom", (message, buffers) => this.receive(message, buffers))
    this.sizes = new ResizeObserver(() => this.draw())
    this.sizes.observe(this.$("stage"))
    this.themes = new MutationObserver(() => setTimeout(() => this.draw(), 300))
    this.themes.observe(document.body, { attributes: true })
    this.show()
    this.model.send({ type: "ready" })
  }
  $(name) {
    return this.root.querySelector(`.ds-${name}`)
  }
  name() {
    const name = this.$("preset").value.split(":").pop().split("/").pop().replace(".json", "")
    this.$("folder").value = `runs/${name}`
  }
  form() {
    const changes = this.$("changes").value.trim()
    return {
      preset: this.$("preset").value.trim(),
      folder: this.$("folder").value.trim(),
      overrides: changes ? changes.split(/\s+/) : [],
      device: this.$("device").value,
      processes: Number(this.$("processes").value) || null,
      slurm: this.$("where").value === "Slurm" ? this.$("queue").value.trim().split(/\s+/) : null,
    }
  }
  receive(message, buffers) {
    if (message.type === "sample") {
      const audio = this.root.querySelector("audio")
      if (this.url) URL.revokeObjectURL(this.url)
      this.url = URL.createObjectURL(new Blob([buffers[0]], { type: "audio/wav" }))
      audio.src = this.url
      this.root.dataset.sample = message.name
    } else if (message.type === "plan") this.$("planned").textContent = message.text
    else this.$("message").textContent = message.text || ""
  }
  listen() {
    if (this.$("samples").value) this.model.send({ type: "sample", name: this.$("samples").value })
  }
  options(select, values, value, text = v => v) {
    const now = [...select.options].map(o => o.value).join("\n")
    if (now !== values.join("\n")) select.replaceChildren(...values.map(v => new Option(text(v), v)))
    if (value !== undefined && document.activeElement !== select) select.value = value
  }
  show() {
    const data = this.model.get("data"),
      { status = "none", step = 0, steps = 0, samples = [] } = data
    this.options(this.$("runs"), data.runs || [], data.folder, v => v.split("/").slice(-2).join("/"))
    const alive = ["running", "starting", "queued"].includes(status)
    this.$("status").textContent = status === "none" ? "no run yet: start one below" : status
    this.$("status").dataset.status = status
    this.root.dataset.status = status
    this.root.dataset.step = step
    this.$("stop").disabled = !alive
    this.$("resume").disabled = alive || status === "none" || status === "finished"
    const parts = [`step ${step} of ${steps}`]
    const last = list => (list && list.length ? list[list.length - 1] : null)
    const loss = last(data.train?.loss),
      score = last(data.validation?.score)
    if (loss !== null) parts.push(`loss ${short(loss)}`)
    if (score !== null) parts.push(`validation ${short(score)}`)
    if (data.speed) parts.push(`${short(data.speed)} steps a second`)
    if (alive && data.speed && steps > step) parts.push(`${time((steps - step) / data.speed)} left`)
    for (const [used, total] of data.gpus || []) parts.push(`GPU ${used.toFixed(1)} of ${total.toFixed(0)} GB`)
    this.$("readout").textContent = status === "none" ? "" : parts.join(" · ")
    const sampled = this.$("samples").value
    this.$("hear").style.display = samples.length ? "" : "none"
    this.options(this.$("samples"), samples, samples.includes(sampled) ? sampled : last(samples) ?? undefined)
    if (samples.length && this.$("samples").value !== this.asked) {
      this.asked = this.$("samples").value
      this.listen()
    }
    this.$("tail").textContent = (data.tail || []).join("\n")
    this.$("tail").style.display = (data.tail || []).length ? "" : "none"
    this.draw()
  }
  draw() {
    const stage = this.$("stage"),
      canvas = stage.firstChild,
      data = this.model.get("data"),
      dark = isDark(this.root),
      theme = dark ? DARK : LIGHT
    this.root.classList.toggle("ds-dark", dark)
    const { train = {}, validation = {} } = data,
      curves = [
        { x: train.step || [], y: train.loss || [], color: theme.train, text: "training loss", width: 1.2 },
        { x: validation.step || [], y: validation.score || [], color: theme.best, text: "validation", width: 2, dots: true },
      ].map(c => ({ ...c, points: c.x.map((x, i) => [x, c.y[i]]).filter(([, y]) => Number.isFinite(y)) }))
    const points = curves.flatMap(c => c.points)
    stage.style.display = points.length ? "" : "none"
    const width = stage.clientWidth
    if (!width || !points.length) return
    const height = 220,
      scale = window.devicePixelRatio || 1,
      left = 58,
      right = width - 22,
      top = 26,
      bottom = height - 36
    canvas.width = width * scale
    canvas.height = height * scale
    canvas.style.height = `${height}px`
    canvas.setAttribute("aria-label", `curves of the loss until step ${data.step}`)
    const c = canvas.getContext("2d")
    c.setTransform(scale, 0, 0, scale, 0, 0)
    const ys = points.map(p => p[1]),
      log = Math.min(...ys) > 0 && Math.max(...ys) / Math.min(...ys) > 8
    const f = log ? Math.log10 : v => v
    let [low, high] = [f(Math.min(...ys)), f(Math.max(...ys))]
    const pad = (high - low || Math.abs(high) || 1) * 0.06
    low -= pad
    high += pad
    const most = Math.max(data.steps || 0, ...points.map(p => p[0]), 1),
      X = x => left + (x / most) * (right - left),
      Y = y => bottom - ((f(y) - low) / (high - low)) * (bottom - top)
    const write = (text, x, y, align = "center", color = theme.soft) => {
      c.font = "11px system-ui, sans-serif"
      c.fillStyle = color
      c.textAlign = align
      c.textBaseline = "middle"
      c.fillText(text, x, y)
    }
    c.strokeStyle = theme.line
    c.lineWidth = 1
    for (const v of log ? logTicks(low, high) : ticks(low, high, 5)) {
      const y = Math.round(Y(v)) + 0.5
      c.beginPath()
      c.moveTo(left, y)
      c.lineTo(right, y)
      c.stroke()
      write(short(v), left - 6, y, "right")
    }
    for (const v of ticks(0, most, width < 500 ? 3 : 8)) write(v, X(v), bottom + 12)
    write("step", (left + right) / 2, height - 8)
    for (const curve of curves) {
      c.strokeStyle = c.fillStyle = curve.color
      c.lineWidth = curve.width
      c.beginPath()
      curve.points.forEach(([x, y], i) => (i ? c.lineTo(X(x), Y(y)) : c.moveTo(X(x), Y(y))))
      c.stroke()
      if (curve.dots)
        for (const [x, y] of curve.points) {
          c.beginPath()
          c.arc(X(x), Y(y), 3.2, 0, 7)
          c.fill()
        }
    }
    let x = left
    for (const curve of curves.filter(curve => curve.points.length)) {
      c.strokeStyle = c.fillStyle = curve.color
      c.lineWidth = curve.width + 0.6
      c.beginPath()
      c.moveTo(x, 11)
      c.lineTo(x + 18, 11)
      c.stroke()
      write(curve.text + (log ? " (log scale)" : ""), x + 24, 11, "left", theme.ink)
      x += 44 + c.measureText(curve.text + (log ? " (log scale)" : "")).width
    }
  }
  close() {
    this.sizes.disconnect()
    this.themes.disconnect()
  }
}

function time(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`
}

function render({ model, el }) {
  const view = new Monitor(el, model)
  return () => view.close()
}

export default { render }
