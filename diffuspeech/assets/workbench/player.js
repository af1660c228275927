// The trajectory player: a run of masked diffusion, seen and played step by step.
// One ES module for JupyterLab (anywidget) and, with its data beside it, for a page without a kernel.

const RATE = 16000
const MASKED = 0,
  GUESS = 1,
  GIVEN = 2,
  NEW = 3,
  COMMITTED = 4,
  REMASKED = 5,
  NOTHING = -32768
const COLORS = ["state", "commit step", "confidence", "entropy", "token"]
const STATES = ["masked", "best guess", "given", "new at this step", "committed", "masked again"]
const THEMES = {
  // Okabe and Ito's colours, which differ to colour-blind eyes too
  light: {
    ink: "#1f2328",
    soft: "#5d646d",
    line: "rgba(31,35,40,.16)",
    page: "#ffffff",
    state: ["#c6cad0", "#cc79a7", "#009e73", "#e69f00", "#0072b2", "#d55e00"],
  },
  dark: {
    ink: "#e6e6e6",
    soft: "#a3a9b3",
    line: "rgba(230,230,230,.2)",
    page: "#111318",
    state: ["#4b505b", "#cc79a7", "#2fb58c", "#f0b429", "#56b4e9", "#ff7a3d"],
  },
}
const VIRIDIS = [
  [68, 1, 84],
  [72, 40, 120],
  [62, 74, 137],
  [49, 104, 142],
  [38, 130, 142],
  [31, 158, 137],
  [53, 183, 121],
  [109, 205, 89],
  [180, 222, 44],
  [253, 231, 37],
]

const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16))
const clamp = (x, low, high) => Math.min(Math.max(x, low), high)
const isMasked = state => state === MASKED || state === GUESS || state === REMASKED
const percent = p => (p >= 0.9995 ? "100%" : p < 0.001 ? "<0.1%" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)}%`)

function ramp(x) {
  const at = clamp(x, 0, 1) * (VIRIDIS.length - 1),
    i = Math.min(Math.floor(at), VIRIDIS.length - 2)
  return VIRIDIS[i].map((c, j) => c + (at - i) * (VIRIDIS[i + 1][j] - c))
}

function hue(token) {
  // a colour for each token, neighbours far apart
  const h = ((token * 137.508) % 360) / 60,
    c = 0.55,
    x = c * (1 - Math.abs((h % 2) - 1))
  const [r, g, b] = [
    [c, x, 0],
    [x, c, 0],
    [0, c, x],
    [0, x, c],
    [x, 0, c],
    [c, 0, x],
  ][Math.floor(h)]
  return [r, g, b].map(v => 255 * (v + 0.27))
}

function unpack({ type, data }) {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0))
  return new {
    uint8: Uint8Array,
    int16: Int16Array,
    uint16: Uint16Array,
    int32: Int32Array,
    float32: Float32Array,
  }[type](bytes.buffer)
}

// ---- a run ----------------------------------------------------------------------------------------------

class Run {
  constructor(data) {
    Object.assign(this, data)
    for (const name of ["tokens", "state", "committed", "probability", "entropy"])
      this[name] = unpack(data[name])
    this.places = this.positions * this.codebooks
    if (data.candidates) {
      const { k, ids, logp, entropy } = data.candidates
      this.candidates = { k, ids: unpack(ids), logp: unpack(logp), entropy: unpack(entropy) }
    }
    const S = this.steps + 1,
      N = this.places,
      zeros = () => new Array(S).fill(0)
    Object.assign(this, { left: zeros(), fresh: zeros(), again: zeros() })
    for (let n = 0; n < S; n++)
      for (let i = n * N; i < (n + 1) * N; i++) {
        this.left[n] += isMasked(this.state[i])
        this.fresh[n] += this.state[i] === NEW
        this.again[n] += this.state[i] === REMASKED
      }
    this.free = this.left[0]
  }
  asked(n, p) {
    // were candidates recorded for this place, by the call on the canvas after step n?
    return (
      Boolean(this.candidates) &&
      n < this.steps &&
      this.candidates.logp[(n * this.places + p) * this.candidates.k] > NOTHING
    )
  }
  best(n, p, count) {
    // the likeliest tokens there: [token, probability]
    const { k, ids, logp } = this.candidates,
      at = (n * this.places + p) * k,
      found = []
    for (let j = 0; j < Math.min(k, count) && logp[at + j] > NOTHING; j++)
      found.push([ids[at + j], Math.exp(logp[at + j] / 1000)])
    return found
  }
  value(name, n, p) {
    // of its probability and entropy
    const v = this[name][n * this.places + p]
    return v === NOTHING ? NaN : v / 1000
  }
  stepAt(share) {
    // the step at which nearest to this share of the masked tokens is committed
    let best = 0
    for (let n = 0; n <= this.steps; n++)
      if (Math.abs(this.share(n) - share) <= Math.abs(this.share(best) - share)) best = n
    return best
  }
  share(n) {
    return this.free ? 1 - this.left[n] / this.free : n / Math.max(this.steps, 1)
  }
  get width() {
    return this.seconds || this.positions
  }
  unit(x) {
    return this.seconds ? `${x.toFixed(2)} s` : `position ${Math.floor(x)}`
  }
}

// What other settings would commit next, from the recorded candidates alone
function preview(run, n, { ranking, temperature, topP, seed }) {
  let state = (seed * 2654435761 + n * 40503 + 1) >>> 0
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return (state + 0.5) / 4294967296
  }
  const found = []
  for (let p = 0; p < run.places; p++) {
    if (run.tokens[n * run.places + p] !== run.mask_id || !run.asked(n, p)) continue
    let choices = run.best(n, p, 99),
      sum = 0
    const top = choices[0][1],
      second = choices.length > 1 ? choices[1][1] : 0
    const score = {
      confidence: top,
      margin: top - second,
      entropy: -run.candidates.entropy[n * run.places + p],
      "left to right": -p,
      random: uniform(),
    }[ranking]
    choices = choices.filter(([, q]) => {
      const keep = sum < topP
      sum += q
      return keep
    })
    let token = choices[0][0]
    const draw = uniform()
    if (temperature > 0) {
      const weights = choices.map(([, q]) => Math.pow(q, 1 / temperature)),
        total = weights.reduce((a, b) => a + b, 0)
      let passed = 0
      token =
        choices[
          Math.max(
            weights.findIndex(w => (passed += w) >= draw * total),
            0,
          )
        ][0]
    }
    found.push({ p, token, score })
  }
  const count = n < run.steps ? run.fresh[n + 1] : 0
  const taken = found.sort((a, b) => b.score - a.score || a.p - b.p).slice(0, count)
  const next = Math.min(n + 1, run.steps) * run.places
  return taken.map(c => ({
    ...c,
    same: run.tokens[next + c.p] === c.token && run.state[next + c.p] === NEW,
    here: run.state[next + c.p] === NEW,
  }))
}

// ---- sound ----------------------------------------------------------------------------------------------

class Sound {
  // one wave at a time; another takes over at the same place, without a click
  constructor(onend) {
    this.onend = onend
    this.offset = 0
    this.loop = false
    this.buffer = null
    this.node = null
  }
  static async decode(bytes) {
    return new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes)
  }
  get playing() {
    return Boolean(this.node)
  }
  get duration() {
    return this.buffer ? this.buffer.duration : 0
  }
  get time() {
    if (!this.node) return this.offset
    const t = this.offset + this.context.currentTime - this.began
    return this.loop ? t % this.duration : clamp(t, 0, this.duration)
  }
  start(from) {
    this.context ||= new AudioContext()
    this.context.resume()
    if (from >= this.duration - 0.01) from = 0
    const node = this.context.createBufferSource(),
      gain = this.context.createGain(),
      now = this.context.currentTime
    node.buffer = this.buffer
    node.loop = this.loop
    node.connect(gain).connect(this.context.destination)
    gain.gain.setValueAtTime(0, now)
    gain.gain.linearRampToValueAtTime(1, now + 0.015)
    node.start(now, from)
    node.onended = () => {
      if (this.node === node) {
        this.node = null
        this.offset = 0
        this.onend()
      }
    }
    Object.assign(this, { node, gain, offset: from, began: now })
  }
  stop() {
    if (!this.node) return
    const { node, gain, context } = this,
      now = context.currentTime
    this.offset = this.time
    this.node = null
    gain.gain.setValueAtTime(1, now)
    gain.gain.linearRampToValueAtTime(0, now + 0.015)
    node.stop(now + 0.02)
  }
  use(buffer) {
    if (buffer === this.buffer) return
    const playing = this.playing,
      at = this.time
    this.stop()
    this.buffer = buffer
    this.offset = buffer ? Math.min(at, buffer.duration) : at
    if (playing && buffer) this.start(this.offset)
  }
  seek(time) {
    const playing = this.playing
    this.stop()
    this.offset = clamp(time, 0, this.duration)
    if (playing) this.start(this.offset)
  }
  setLoop(loop) {
    const at = this.time
    this.loop = loop
    if (this.playing) {
      this.stop()
      this.start(at)
    }
  }
  close() {
    this.stop()
    this.context?.close()
  }
}

const FRAME = 400,
  HOP = 160,
  SIZE = 512,
  BANDS = 96

function fft(re, im) {
  const n = re.length
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1
    for (; j & bit; bit >>= 1) j ^= bit
    j ^= bit
    if (i < j) {
      ;[re[i], re[j]] = [re[j], re[i]]
      ;[im[i], im[j]] = [im[j], im[i]]
    }
  }
  for (let size = 2; size <= n; size <<= 1) {
    const half = size >> 1,
      step = (-2 * Math.PI) / size
    for (let k = 0; k < half; k++) {
      const c = Math.cos(step * k),
        s = Math.sin(step * k)
      for (let i = k; i < n; i += size) {
        const j = i + half,
          x = re[j] * c - im[j] * s,
          y = re[j] * s + im[j] * c
        re[j] = re[i] - x
        im[j] = im[i] - y
        re[i] += x
        im[i] += y
      }
    }
  }
}

function spectrogram(wave) {
  // energy in mel bands, 0 to 1 over 60 dB below the loudest
  const frames = Math.max(1, Math.ceil(wave.length / HOP)),
    out = new Float32Array(frames * BANDS)
  const mel = f => 1127 * Math.log(1 + f / 700),
    edges = []
  for (let b = 0; b < BANDS + 2; b++)
    edges.push((700 * (Math.exp((mel(RATE / 2) * b) / (BANDS + 1) / 1127) - 1) * SIZE) / RATE)
  const re = new Float32Array(SIZE),
    im = new Float32Array(SIZE),
    power = new Float32Array(SIZE / 2 + 1)
  let top = 1e-6
  for (let t = 0; t < frames; t++) {
    re.fill(0)
    im.fill(0)
    for (let i = 0; i < FRAME; i++) {
      const at = t * HOP + i - FRAME / 2
      if (at >= 0 && at < wave.length) re[i] = wave[at] * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / FRAME))
    }
    fft(re, im)
    for (let f = 0; f < power.length; f++) power[f] = re[f] * re[f] + im[f] * im[f]
    for (let b = 0; b < BANDS; b++) {
      const low = Math.floor(edges[b]),
        high = Math.max(Math.ceil(edges[b + 2]), low + 1)
      let sum = 0
      for (let f = low; f <= high && f < power.length; f++) sum += power[f]
      out[t * BANDS + b] = sum / (high - low + 1)
      top = Math.max(top, out[t * BANDS + b])
    }
  }
  return { frames, values: out.map(v => clamp(1 + Math.log10(v / top + 1e-9) / 6, 0, 1)) }
}

// ---- what is on the page ----------------------------------------------------------------------------------

const CONTROLS = `
  <div class="ds-row ds-head"><span class="ds-title"></span><span class="ds-soft ds-about"></span></div>
  <div class="ds-row ds-soft ds-settings"></div>
  <div class="ds-row ds-rerun">
    <label class="ds-models">model <select class="ds-model"></select></label>
    <label class="ds-clips">clip <select class="ds-clip"></select></label>
    <label>sampler <select class="ds-sampler"></select></label>
    <label>steps <input type="number" class="ds-set-steps" min="1" step="1"></label>
    <label>temperature <input type="number" class="ds-set-temperature" min="0" max="5" step="0.1"></label>
    <label>seed <input type="number" class="ds-set-seed" min="0" step="1" placeholder="0"></label>
    <label class="ds-lengths">length <input type="number" class="ds-set-scale" min="0.3" max="3" step="0.05"></label>
    <button class="ds-start" title="a new run with these settings, beside this one (enter)">go</button>
    <button class="ds-remove" title="take the last run away (u)">remove last</button>
    <span class="ds-news ds-soft" role="status" aria-live="polite"></span>
  </div>
  <details class="ds-own"><summary>Your own: a recording, a sound file, or a sentence</summary>
    <div class="ds-row">
      <button class="ds-record" aria-pressed="false" title="record with the microphone, and press again to stop">● record</button>
      <label>or open <input type="file" class="ds-file" accept="audio/*,video/*"></label>
      <label class="ds-own-words">words <input type="text" class="ds-own-text" placeholder="of the recording, or to be spoken"
        title="what is spoken in the recording (transcribed when empty); without a recording: what to speak"></label>
      <button class="ds-send" title="a new run with this utterance, beside this one">go</button>
      <button class="ds-forget" title="use no recording">forget it</button>
    </div>
    <div class="ds-own-state ds-soft" role="status" aria-live="polite"></div>
  </details>
  <div class="ds-row">
    <button class="ds-play" title="play the sound of this step (space)">▶ sound</button>
    <button class="ds-loop" aria-pressed="false" title="repeat the sound (l)" aria-label="repeat">↻</button>
    <button class="ds-first" title="first step (home)" aria-label="first step">|◀</button>
    <button class="ds-back" title="step back (arrow left)" aria-label="step back">◀</button>
    <input type="range" class="ds-slider" min="0" aria-label="step">
    <button class="ds-forward" title="step forward (arrow right)" aria-label="step forward">▶</button>
    <button class="ds-last" title="last step (end)" aria-label="last step">▶|</button>
    <button class="ds-run" aria-pressed="false" title="go through the steps (r)">run</button>
    <span class="ds-step"></span>
  </div>
  <div class="ds-readout ds-soft" role="status" aria-live="polite"></div>
  <div class="ds-row">
    <label>colour <select class="ds-color" title="keys 1 to 5"></select></label>
    <label class="ds-guess">masked places <select class="ds-mode" title="key m">
      <option value="guess">best guess</option><option value="silent">silent</option></select></label>
    <label class="ds-which">playing <select class="ds-active" title="key a"></select></label>
    <span class="ds-row ds-legend"></span>
  </div>
  <div class="ds-stage"><canvas role="img"></canvas><canvas class="ds-over" tabindex="0" role="img"></canvas><div class="ds-tip" hidden></div></div>
  <div class="ds-row ds-soft ds-sounds"></div>
  <div class="ds-message" role="alert"></div>
  <details class="ds-other"><summary>Other settings, without the network</summary>
    <div class="ds-row">
      <label>ranking <select class="ds-ranking"><option>confidence</option><option>margin</option><option>entropy</option>
        <option>left to right</option><option>random</option></select></label>
      <label>temperature <input type="number" class="ds-temperature" min="0" max="5" step="0.1" value="0"></label>
      <label>top-p <input type="number" class="ds-top-p" min="0.05" max="1" step="0.05" value="1"></label>
      <label>seed <input type="number" class="ds-seed" min="0" step="1" value="0"></label>
    </div>
    <div class="ds-preview ds-soft" aria-live="polite"></div>
  </details>
  <details class="ds-hand"><summary>Step by hand</summary>
    <div class="ds-chosen"></div>
    <div class="ds-row ds-choices"></div>
    <div class="ds-row">
      <label class="ds-words">words <input type="text" class="ds-text" title="what is spoken; change it for other words"></label>
      <label>rule <select class="ds-rule"><option value="">as before</option></select></label>
      <label>steps <input type="number" class="ds-steps" min="1" step="1"></label>
      <label>temperature <input type="number" class="ds-heat" min="0" max="5" step="0.1" placeholder="same"></label>
      <label>top-p <input type="number" class="ds-nucleus" min="0.05" max="1" step="0.05" placeholder="same"></label>
      <label>seed <input type="number" class="ds-new-seed" min="0" step="1" placeholder="same"></label>
      <button class="ds-go" title="fill in what is masked, from this step on (g)">go on</button>
      <button class="ds-undo" title="take back the last change, or the last branch (u)">undo</button>
    </div>
    <div class="ds-changes ds-soft" role="status" aria-live="polite"></div>
  </details>`

class View {
  constructor(el, model) {
    this.model = model
    this.root = document.createElement("div")
    this.root.className = "ds-player"
    this.root.tabIndex = -1
    this.root.dataset.lmSuppressShortcuts = "true" // JupyterLab's own keys would add cells
    el.replaceChildren(this.root)
    el.player = this // for a page's own scripts
    const data = model.get("data")
    if (data.message) {
      this.root.innerHTML = '<div class="ds-message" role="alert"></div>'
      this.$("message").textContent = data.message
      return
    }
    this.root.innerHTML = CONTROLS
    Object.assign(this, {
      runs: data.runs.map(run => new Run(run)),
      active: 0,
      color: "state",
      buffers: {},
      pictures: {},
      urls: {},
      failures: {},
      selected: null,
      hover: null,
      other: null,
      edits: {}, // of each run and step: place -> token, set by hand
      history: {}, // of each run and step: the changes as they were before each edit
      drag: null, // a span under the pointer: where it began, where it is
      past: [], // of each branch, the changes that it was made of
      offered: [], // run, step, place and token of the choices that are shown
    })
    this.mode = data.modes[0] || ""
    this.choose()
    this.step = this.main.steps
    this.sound = new Sound(() => this.showPlaying())
    this.controls()
    this.watch()
    this.load(data)
    this.showSettings()
    this.resize()
    this.go(this.step)
    this.root.dataset.painted = performance.now().toFixed(1)
  }
  $(name) {
    return this.root.querySelector(`.ds-${name}`)
  }
  get run() {
    return this.runs[this.active]
  }
  get at() {
    return this.stepOf(this.run)
  }
  choose() {
    this.main = this.runs.reduce((a, b) => (b.steps > a.steps ? b : a))
  }
  aligned(run) {
    // step by step with the slider: a branch is the same run up to some step
    const branch = (run.branched || this.main.branched) && run.steps === this.main.steps
    return run === this.main || branch
  }
  stepOf(run) {
    return this.aligned(run) ? this.step : run.stepAt(this.main.share(this.step))
  }

  controls() {
    const data = this.model.get("data"),
      on = (name, event, f) => this.$(name).addEventListener(event, f)
    this.$("title").textContent = data.title || this.run.label
    this.$("color").append(...COLORS.map((name, i) => new Option(`${i + 1} ${name}`, name)))
    this.$("rule").append(...(data.rules || []).map(name => new Option(name.replaceAll("_", " "), name)))
    this.$("hand").style.display = this.runs.some(run => run.live) ? "" : "none"
    this.$("sampler").append(...(data.rules || []).map(name => new Option(name.replaceAll("_", " "), name)))
    this.$("clip").append(
      new Option("this one", ""),
      ...(data.clips || []).map(([id, text]) => new Option(text.length > 44 ? `${text.slice(0, 42)} …` : text, id)),
    )
    this.$("clips").style.display = data.clips?.length ? "" : "none"
    this.$("model").append(...(data.models || []).map(([name]) => new Option(name, name)))
    on("model", "change", () => {
      // a model that was distilled begins with few steps, another with those of its rule
      const chosen = (data.models || []).find(([name]) => name === this.$("model").value)
      this.$("set-steps").value = chosen?.[1] ?? this.run.settings?.steps ?? ""
    })
    on("start", "click", () => this.rerun())
    on("remove", "click", () => this.model.send({ type: "drop" }))
    on("record", "click", () => this.record())
    on("file", "change", () => this.open(this.$("file").files[0]))
    on("forget", "click", () => this.own(null))
    on("send", "click", () => this.sendOwn())
    on("own-text", "keydown", event => {
      if (event.key === "Enter") this.sendOwn()
    })
    this.own(null)
    this.$("rerun").addEventListener("keydown", event => {
      if (event.key === "Enter" && event.target.matches("select, input")) {
        event.preventDefault()
        this.rerun()
      }
    })
    this.list()
    this.$("guess").style.display = data.modes.length > 1 ? "" : "none"
    this.$("other").style.display = this.runs.some(run => run.candidates) ? "" : "none"
    this.$("mode").value = this.mode
    on("slider", "input", () => this.go(Number(this.$("slider").value)))
    on("play", "click", () => this.togglePlay())
    on("loop", "click", () => this.toggleLoop())
    on("first", "click", () => this.go(0))
    on("last", "click", () => this.go(this.main.steps))
    on("back", "click", () => this.go(this.step - 1))
    on("forward", "click", () => this.go(this.step + 1))
    on("run", "click", () => this.toggleRun())
    on("color", "change", () => this.setColor(this.$("color").value))
    on("mode", "change", () => this.setMode(this.$("mode").value))
    on("active", "change", () => this.setActive(Number(this.$("active").value)))
    on("other", "toggle", () => this.setOther())
    on("hand", "toggle", () => this.showHand())
    on("go", "click", () => this.goOn())
    on("undo", "click", () => this.undo())
    for (const name of ["ranking", "temperature", "top-p", "seed"]) on(name, "input", () => this.setOther())
    this.root.addEventListener("keydown", event => this.key(event))
    const over = this.$("over")
    over.addEventListener("pointerdown", event => this.press(event))
    over.addEventListener("pointerup", () => this.release())
    over.addEventListener("pointercancel", () => (this.drag = null))
    over.addEventListener("pointermove", event => {
      this.hover = this.find(event)
      if (this.drag && this.hover) this.drag.to = this.hover
      this.overlay()
      this.tip()
    })
    over.addEventListener("pointerleave", () => {
      this.hover = null
      this.overlay()
      this.tip()
    })
    over.addEventListener("click", event => {
      if (!this.dragged) this.click(this.find(event))
    })
  }

  list() {
    // what depends on how many runs there are
    this.$("slider").max = this.main.steps
    this.$("active").replaceChildren(
      ...this.runs.map((run, i) => new Option(`${"ABCDEFGH"[i]} ${run.label}`, i)),
    )
    this.$("active").value = this.active
    this.$("which").style.display = this.runs.length < 2 ? "none" : ""
    this.$("remove").style.display = this.runs.length > this.given ? "" : "none"
  }

  // -- the head row: what the run was made with, and a new one

  get given() {
    // runs that came with the page; those that follow were made on it
    return this.model.get("data").given ?? this.runs.length
  }
  showSettings() {
    const run = this.run,
      s = run.settings || {},
      number = (name, value) => (this.$(name).value = value ?? "")
    this.$("about").textContent = run.text ? `“${run.text}”` : ""
    this.$("rerun").style.display = run.rerun ? "" : "none"
    this.$("own").style.display = run.rerun && s.scale !== undefined ? "" : "none"
    this.$("settings").style.display = run.rerun ? "none" : ""
    this.$("settings").textContent = [
      s.model && `model ${s.model}`,
      s.rule && `sampler ${s.rule}`,
      `steps ${run.steps}`,
      `temperature ${s.temperature ?? 0}`,
      s.seed !== undefined && `seed ${s.seed}`,
      s.scale !== undefined && `length ${s.scale.toFixed(2)}`,
    ]
      .filter(Boolean)
      .join(" · ")
    if (!run.rerun) return
    this.setOption("sampler", s.rule)
    this.setOption("model", s.model)
    this.$("models").style.display = this.$("model").options.length > 1 ? "" : "none"
    this.setOption("clip", s.clip ?? "")
    this.$("lengths").style.display = s.scale === undefined ? "none" : ""
    number("set-steps", s.steps)
    number("set-temperature", s.temperature)
    number("set-seed", s.seed)
    number("set-scale", s.scale)
  }
  setOption(name, value) {
    // choose it in the list, to which one that it has no name for is added: it stays as it is
    const list = this.$(name),
      known = [...list.options].find(o => !o.dataset.own && o.value === value)
    ;[...list.options].find(o => o.dataset.own)?.remove()
    if (!known) {
      const own = new Option(value ?? "this one", "")
      own.dataset.own = true
      list.prepend(own)
    }
    list.value = known ? value : ""
  }
  // -- an utterance of one's own

  own(samples, what = "") {
    // the samples at 16 kHz that the next run is given, or none
    this.samples = samples
    this.$("forget").style.display = samples ? "" : "none"
    this.$("own-state").classList.remove("ds-wrong")
    this.$("own-state").textContent = samples ? `${what}, ${(samples.length / RATE).toFixed(1)} s` : what
    if (!samples) this.$("file").value = ""
  }
  complain(text) {
    this.own(null, text)
    this.$("own-state").classList.add("ds-wrong")
  }
  async open(file, what = file?.name) {
    if (!file) return
    try {
      const sound = await Sound.decode(await file.arrayBuffer()),
        samples = new Float32Array(sound.length)
      for (let c = 0; c < sound.numberOfChannels; c++)
        sound.getChannelData(c).forEach((x, i) => (samples[i] += x / sound.numberOfChannels))
      this.own(samples, what)
    } catch {
      this.complain(`${what}: this browser finds no sound in it`)
    }
  }
  async record() {
    if (this.recorder) return this.recorder.stop()
    let stream
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true })
    } catch (error) {
      return this.complain(`no microphone: ${error.message || error.name}`)
    }
    const parts = [],
      recorder = new MediaRecorder(stream),
      button = this.$("record")
    this.recorder = recorder
    button.setAttribute("aria-pressed", "true")
    button.textContent = "■ stop"
    this.own(null, "recording …")
    const longest = setTimeout(() => recorder.stop(), 30_000)
    recorder.ondataavailable = event => parts.push(event.data)
    recorder.onstop = () => {
      clearTimeout(longest)
      stream.getTracks().forEach(track => track.stop())
      this.recorder = null
      button.setAttribute("aria-pressed", "false")
      button.textContent = "● record"
      this.open(new Blob(parts, { type: recorder.mimeType }), "your recording")
    }
    recorder.start()
  }
  sendOwn() {
    if (!this.samples && !this.$("own-text").value.trim())
      return this.complain("record, open a file, or write a sentence first")
    this.rerun({ clip: null, own: this.$("own-text").value }, this.samples)
  }
  rerun(own = {}, samples = null) {
    if (!this.run.rerun || this.starting) return
    if (this.runs.length > 7) return this.news("eight runs are shown: remove one first", true)
    const number = name => (this.$(name).value === "" ? null : Number(this.$(name).value))
    this.starting = true
    this.news("the model is running …")
    const message = {
      type: "rerun",
      run: this.active,
      clip: this.$("clip").value || null,
      model: this.$("model").value || null,
      rule: this.$("sampler").value || null,
      steps: number("set-steps"),
      temperature: number("set-temperature"),
      seed: number("set-seed"),
      scale: number("set-scale"),
      ...own,
    }
    this.model.send(message, undefined, samples ? [samples.buffer] : undefined)
  }
  news(text, wrong = false) {
    this.$("news").textContent = text
    this.$("news").classList.toggle("ds-wrong", wrong)
  }

  watch() {
    const again = () => {
      if (this.root.isConnected) this.retheme()
    }
    this.sizes = new ResizeObserver(() => this.resize())
    this.sizes.observe(this.$("stage"))
    this.themes = new MutationObserver(() => {
      again()
      setTimeout(again, 300)
    }) // the style sheet comes after the attribute
    for (const at of [document.documentElement, document.body])
      this.themes.observe(at, { attributes: true })
    this.media = matchMedia("(prefers-color-scheme: dark)")
    this.media.addEventListener("change", again)
    this.unwatch = () => {
      this.sizes.disconnect()
      this.themes.disconnect()
      this.media.removeEventListener("change", again)
    }
    this.retheme()
  }
  retheme() {
    const dark = isDark(this.root)
    if (dark === this.dark) return
    this.dark = dark
    this.theme = THEMES[dark ? "dark" : "light"]
    this.root.classList.toggle("ds-dark", dark)
    this.pictures = {}
    if (this.width) {
      this.legend()
      this.draw()
    }
  }

  // -- sounds: with the page, or sent by the kernel as they are made

  load(data) {
    for (const [key, sound] of Object.entries(data.sounds || {}))
      this.receive(key, Uint8Array.from(atob(sound), c => c.charCodeAt(0)).buffer)
    this.model.on("msg:custom", (message, buffers) => {
      if (message.type === "sound") {
        const bytes = buffers[0]
        this.receive(
          message.key,
          bytes.buffer ? bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) : bytes,
        )
      } else if (message.type === "failed") {
        if (message.key === "branch") this.sent = null
        if (message.key === "branch" || message.key === "listen") this.busy(message.text, true)
        else if (message.key === "rerun") {
          this.starting = false
          this.news(message.text, true)
        }
        else this.failures[message.key] = message.text
        this.showPlaying()
      } else if (message.type === "piece") this.playPiece(buffers[0])
      else if (message.type === "words") {
        Object.assign(this.runs[message.run], { words: message.words, phones: message.phones })
        this.resize()
        this.draw()
      }
    })
    this.model.on("change:data", () => this.follow(this.model.get("data").runs))
    this.model.send({ type: "ready" })
  }
  follow(runs) {
    // the kernel has added a run, or taken the last one away
    const added = runs.slice(this.runs.length),
      share = this.main.share(this.step)
    for (let i = runs.length; i < this.runs.length; i++)
      for (const found of [this.buffers, this.pictures, this.urls, this.failures, this.edits, this.history])
        for (const key of Object.keys(found))
          if (key.replace(/^(map|sound)\//, "").startsWith(`${i}/`)) delete found[key]
    if (added.length) {
      this.past.push(this.sent ? [this.sent, this.edits[this.sent], this.history[this.sent]] : null)
      if (this.sent) {
        delete this.edits[this.sent]
        delete this.history[this.sent]
      }
    } else if (runs.length < this.runs.length) {
      const [key, changes, history] = this.past.pop() || []
      if (key) {
        this.edits[key] = changes
        this.history[key] = history
      }
    }
    const step = this.at,
      byHand = Boolean(this.sent)
    this.sent = null
    this.starting = false
    this.news("")
    this.runs = [...this.runs.slice(0, runs.length), ...added.map(run => new Run(run))]
    this.active = added.length ? this.runs.length - 1 : Math.min(this.active, this.runs.length - 1)
    this.choose()
    this.list()
    this.busy("")
    this.resize()
    if (added.length && !byHand) this.go(this.main.stepAt(share))
    else this.go(this.run === this.main ? step : this.step)
    this.showSettings()
    this.showHand()
  }
  async receive(key, bytes) {
    try {
      this.urls[key] = new Blob([bytes], { type: "audio/mpeg" })
      this.buffers[key] = await Sound.decode(bytes)
    } catch (error) {
      this.failures[key] = `this browser cannot play it (${error.name})`
    }
    if (key === this.key_()) {
      this.useSound()
      this.draw()
    } else this.showPlaying()
  }
  key_(run = this.run) {
    // without masks both modes are one sound
    const near = (a, b) => (Math.abs(b - this.stepOf(run)) < Math.abs(a - this.stepOf(run)) ? b : a)
    const n = run.sound_steps?.length ? run.sound_steps.reduce(near) : this.stepOf(run)
    return `${this.runs.indexOf(run)}/${run.left[n] && run.candidates ? this.mode : "silent"}/${n}`
  }
  useSound() {
    if (!this.mode) return this.showPlaying()
    const buffer = this.buffers[this.key_()]
    if (buffer) this.sound.use(buffer)
    else if (!this.failures[this.key_()]) this.model.send({ type: "need", key: this.key_(), mode: this.mode })
    if (this.pending && buffer) {
      this.pending = false
      this.sound.start(this.sound.offset)
      this.tick()
    }
    this.showPlaying()
  }
  showPlaying() {
    const ready = Boolean(this.buffers[this.key_()]),
      failure = this.failures[this.key_()]
    const button = this.$("play"),
      made = Object.keys(this.buffers).length,
      all = this.countSounds()
    button.disabled = !this.mode
    button.textContent = this.sound.playing || this.pending ? "❚❚ pause" : "▶ sound"
    this.$("loop").disabled = !this.mode
    this.root.dataset.playing = this.sound.playing
    this.root.dataset.sound = !this.mode ? "none" : failure ? "failed" : ready ? "ready" : "waiting"
    this.$("message").textContent = failure ? `No sound of step ${this.at}: ${failure}` : ""
    this.$("sounds").textContent = !this.mode
      ? "no sound: this run came without a decoder"
      : ready || failure
        ? made < all
          ? `${made} of ${all} sounds are ready`
          : ""
        : `the sound of step ${this.at} is being made …`
  }
  countSounds() {
    // without masks there is nothing to guess, and one sound serves both modes
    if (this.runs.every(run => run.sound_steps)) return Object.keys(this.model.get("data").sounds).length
    return this.runs.reduce(
      (sum, run) => sum + run.left.reduce((n, left) => n + (left && run.candidates ? 2 : 1), 0),
      0,
    )
  }
  togglePlay() {
    if (!this.mode) return
    if (this.sound.playing || this.pending) {
      this.pending = false
      this.sound.stop()
    } else if (this.buffers[this.key_()]) {
      this.sound.use(this.buffers[this.key_()])
      this.sound.start(this.sound.offset)
    } else this.pending = true
    this.showPlaying()
    this.tick()
  }
  toggleLoop() {
    this.sound.setLoop(!this.sound.loop)
    this.$("loop").setAttribute("aria-pressed", this.sound.loop)
  }
  toggleRun() {
    if (this.timer) {
      clearInterval(this.timer)
      this.timer = null
    } else {
      if (this.step === this.main.steps) this.go(0)
      this.timer = setInterval(
        () => {
          if (this.step < this.main.steps) this.go(this.step + 1)
          if (this.step === this.main.steps) this.toggleRun()
        },
        clamp(6000 / this.main.steps, 60, 600),
      )
    }
    this.$("run").setAttribute("aria-pressed", Boolean(this.timer))
  }
  tick() {
    this.root.dataset.time = this.sound.time.toFixed(3)
    this.overlay()
    if (this.sound.playing) requestAnimationFrame(() => this.tick())
  }

  // -- moves

  go(step) {
    this.step = clamp(step, 0, this.main.steps)
    this.$("slider").value = this.step
    this.setOther(false)
    this.useSound()
    this.describe()
    this.showHand()
    this.draw()
    this.tip()
  }
  setColor(color) {
    this.color = color
    this.$("color").value = color
    this.legend()
    this.draw()
  }
  setMode(mode) {
    this.mode = mode
    this.$("mode").value = mode
    this.useSound()
    this.draw()
  }
  setActive(i) {
    this.active = i % this.runs.length
    this.$("active").value = this.active
    this.useSound()
    this.describe()
    this.showSettings()
    this.showHand()
    this.resize()
    this.draw()
  }
  setOther(draw = true) {
    this.other = null
    if (this.$("other").open && this.run.candidates) {
      this.other = preview(this.run, this.at, {
        ranking: this.$("ranking").value,
        temperature: Number(this.$("temperature").value) || 0,
        topP: Number(this.$("top-p").value) || 1,
        seed: Number(this.$("seed").value) || 0,
      })
      const n = this.other.length,
        here = this.other.filter(c => c.here).length,
        same = this.other.filter(c => c.same).length
      this.$("preview").textContent = n
        ? `The next step would commit ${n} tokens (outlined); ${here} of them at places that this run` +
          ` takes next, ${same} with the same token. From the ${this.run.candidates.k} likeliest tokens of each place.`
        : "No candidates were recorded for this step."
    }
    if (draw) this.draw()
  }

  // -- by hand: tokens that are changed at a step, and the run that goes on from there

  changes() {
    // of the run and step that are shown
    return (this.edits[`${this.active}/${this.at}`] ||= new Map())
  }
  before() {
    // what they were before each edit, for undo
    return (this.history[`${this.active}/${this.at}`] ||= [])
  }
  describeChanges(run, changes) {
    // each token, and spans that are masked
    const parts = [],
      masked = []
    for (const [p, token] of [...changes].sort(([a], [b]) => a - b)) {
      const q = Math.floor(p / run.codebooks)
      if (token !== run.mask_id) parts.push(`${q} → ${token}`)
      else if (masked.length && q <= masked.at(-1)[1] + 1) masked.at(-1)[1] = q
      else masked.push([q, q])
    }
    return [...masked.map(([a, b]) => (a === b ? `${a} → masked` : `${a} to ${b} masked`)), ...parts].join(", ")
  }
  stepsLeft(run, n) {
    // for what is masked by hand; a finished run is filled in with as many as it had
    return run.steps - n || Math.max(run.steps, 1)
  }
  showHand() {
    const hand = this.$("hand")
    if (!hand.open || hand.style.display === "none") return
    const run = this.run,
      n = this.at,
      p = this.selected,
      changes = this.changes()
    this.$("changes").classList.remove("ds-wrong")
    this.$("steps").placeholder = this.stepsLeft(run, n)
    this.$("text").placeholder = run.text || ""
    this.$("words").style.display = run.text ? "" : "none"
    this.$("go").textContent = `go on from step ${n}`
    this.$("go").disabled = !run.live
    const edited = changes.size || this.before().length || this.run.by_hand.length
    this.$("undo").disabled = !edited && this.runs.length <= this.given
    const known = p !== null && p < run.places
    this.offer(...(known ? [run, n, p, changes.get(p) ?? run.tokens[n * run.places + p]] : []))
    this.$("chosen").textContent = known
      ? this.where(run, p)
      : "Click a token in the map (shift and arrows) to change it; drag over tokens or words to mask them."
    this.$("changes").textContent =
      changes.size === 0
        ? "Nothing is changed at this step. What stands is kept, what is masked is filled in."
        : `Changed at this step: ${this.describeChanges(run, changes)}`
  }
  offer(...now) {
    // made anew only for something else: a number that is being typed there would be lost, and the focus
    if (now.length === this.offered.length && now.every((x, i) => x === this.offered[i])) return
    this.offered = now
    const choices = this.$("choices"),
      inside = choices.contains(document.activeElement)
    choices.replaceChildren(...(now.length ? this.choices(...now) : []))
    if (inside) (choices.querySelector("[aria-pressed=true]") || this.root).focus()
  }
  choices(run, n, p, now) {
    const i = n * run.places + p,
      masked = isMasked(run.state[i]),
      call = masked ? n : run.committed[i] - 1
    const choice = (token, text) => {
      const box = document.createElement("span"),
        take = document.createElement("button")
      box.className = "ds-choice"
      take.textContent = text
      take.className = "ds-take"
      take.setAttribute("aria-pressed", token === now)
      take.title = "set this token"
      take.addEventListener("click", () => this.change(p, token))
      if (this.mode && token !== run.mask_id) {
        const listen = document.createElement("button")
        listen.textContent = "♪"
        listen.className = "ds-listen"
        listen.title = "play a second around it, with this token"
        listen.setAttribute("aria-label", `play token ${token} in its context`)
        listen.addEventListener("click", () => this.listen(p, token))
        box.append(listen)
      }
      box.append(take)
      return box
    }
    const found = call >= 0 && run.asked(call, p) ? run.best(call, p, 8) : []
    const rows = found.map(([token, q]) => choice(token, `${token} · ${percent(q)}`))
    if (now !== run.mask_id && !found.some(([token]) => token === now)) rows.unshift(choice(now, `${now}`))
    rows.push(choice(run.mask_id, "masked"))
    const label = document.createElement("label"),
      other = document.createElement("input")
    Object.assign(other, { type: "number", min: 0, className: "ds-token" })
    other.addEventListener("change", () => {
      const token = Number(other.value)
      if (other.value !== "" && Number.isInteger(token) && token >= 0) this.change(p, token)
    })
    label.append("another ", other)
    return [...rows, label]
  }
  change(p, token) {
    const changes = this.changes()
    this.before().push(new Map(changes))
    changes.delete(p) // the last change comes last
    if (token !== this.run.tokens[this.at * this.run.places + p]) changes.set(p, token)
    this.showHand()
    this.draw()
  }
  asTokens() {
    return [...this.changes()]
  }
  listen(place, token) {
    this.sound.stop()
    this.busy("sound is being made …")
    const { active: run, mode } = this
    this.model.send({ type: "listen", run, step: this.at, mode, tokens: this.asTokens(), place, token })
  }
  async playPiece(bytes) {
    const data = bytes.buffer
      ? bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)
      : bytes
    const piece = new Sound(() => {})
    piece.buffer = await Sound.decode(data)
    piece.start(0)
    piece.onend = () => piece.close()
    this.root.dataset.piece = piece.duration.toFixed(3)
    this.busy("")
  }
  goOn() {
    if (!this.run.live || this.sent || this.runs.length > 7) return
    const number = name => (this.$(name).value === "" ? null : Number(this.$(name).value))
    this.busy("the model goes on …")
    this.sent = `${this.active}/${this.at}`
    this.model.send({
      type: "branch",
      run: this.active,
      step: this.at,
      tokens: this.asTokens(),
      rule: this.$("rule").value || null,
      steps: number("steps") || this.stepsLeft(this.run, this.at),
      temperature: number("heat"),
      top_p: number("nucleus"),
      seed: number("new-seed"),
      text: this.$("text").value.trim() || null,
    })
  }
  undo() {
    if (this.before().length) this.edits[`${this.active}/${this.at}`] = this.before().pop()
    else if (this.runs.length > this.given) this.model.send({ type: "drop" })
    this.showHand()
    this.draw()
  }

  // -- spans: dragged over tokens of the map, or over words, and masked as one edit

  press(event) {
    const found = this.find(event)
    this.dragged = false
    if (event.button !== 0 || !found || (found.row === undefined && !found.word)) return
    if (!(found.run || this.run).live) return
    this.drag = { from: found, to: found }
    event.target.setPointerCapture(event.pointerId)
  }
  dragSpan() {
    // first and last position
    const { from, to } = this.drag,
      run = from.run || this.run
    const [a, b] = [from, to].map(found => (found.at - this.left) / (this.x(run.width) - this.left))
    const [low, high] = [clamp(Math.min(a, b), 0, 1), clamp(Math.max(a, b), 0, 1)]
    const place = share => clamp(Math.floor(share * run.positions), 0, run.positions - 1)
    if (!from.word) return [place(low), place(high)]
    const touched = run.words.filter(([, start, end]) => start < high * run.width && end > low * run.width)
    if (!touched.length) return [place(low), place(high)]
    const first = Math.round((touched[0][1] / run.width) * run.positions),
      end = Math.round((touched.at(-1)[2] / run.width) * run.positions)
    return [clamp(first, 0, run.positions - 1), clamp(end - 1, first, run.positions - 1)]
  }
  release() {
    const drag = this.drag
    if (!drag) return
    const [first, last] = this.dragSpan()
    this.drag = null
    if (Math.abs(drag.to.at - drag.from.at) < 5) return
    this.dragged = true
    const { run = this.run, row } = drag.from
    if (run !== this.run) this.setActive(this.runs.indexOf(run))
    if (row !== undefined && this.aligned(run)) this.go(row)
    this.$("hand").open = true
    this.maskSpan(first, last)
  }
  maskSpan(first, last) {
    const { run } = this,
      changes = this.changes()
    this.before().push(new Map(changes))
    for (let p = first * run.codebooks; p < (last + 1) * run.codebooks; p++) {
      changes.delete(p)
      if (run.tokens[this.at * run.places + p] !== run.mask_id) changes.set(p, run.mask_id)
    }
    this.showHand()
    this.draw()
  }
  busy(text, wrong = false) {
    this.$("changes").textContent = text
    this.$("changes").classList.toggle("ds-wrong", wrong)
    if (!text) this.showHand()
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return
    const typing = event.target.matches("select, input[type=number], input[type=text]")
    const select = by => this.select(clamp((this.selected ?? -1) + by, 0, this.run.places - 1))
    const keys = {
      ArrowLeft: () => (event.shiftKey ? select(-1) : this.go(this.step - 1)),
      ArrowRight: () => (event.shiftKey ? select(1) : this.go(this.step + 1)),
      ArrowDown: () => this.go(this.step + 1),
      ArrowUp: () => this.go(this.step - 1),
      Home: () => this.go(0),
      End: () => this.go(this.main.steps),
      " ": () => this.togglePlay(),
      m: () => this.swapMode(),
      l: () => this.mode && this.toggleLoop(),
      r: () => this.toggleRun(),
      a: () => this.setActive(this.active + 1),
      e: () => this.openHand(),
      g: () => this.goOn(),
      x: () => this.selected !== null && this.run.live && this.change(this.selected, this.run.mask_id),
      u: () => this.undo(),
      Escape: () => this.select(null),
    }
    for (const [i, name] of COLORS.entries()) keys[i + 1] = () => this.setColor(name)
    const act = keys[event.key]
    const own = (event.key === " " && event.target.matches("button, summary")) || event.key === "Enter"
    if (!act || typing || own) return
    event.preventDefault()
    event.stopPropagation()
    act()
  }
  swapMode() {
    if (this.$("guess").style.display !== "none") this.setMode(this.mode === "guess" ? "silent" : "guess")
  }
  openHand() {
    if (this.$("hand").style.display === "none") return
    this.$("hand").open = true
    if (this.selected === null) this.select(0)
    this.showHand()
    this.root.querySelector(".ds-take")?.focus()
  }
  select(place) {
    this.selected = place
    this.showHand()
    this.hover = null
    this.overlay()
    this.tip()
  }
  click(found) {
    if (!found) return
    if (found.row !== undefined) {
      const again = this.selected === found.place && found.run === this.run
      if (found.run !== this.run) this.setActive(this.runs.indexOf(found.run))
      if (this.aligned(found.run)) this.go(found.row)
      this.selected = again && !this.run.live ? null : found.place
      if (this.run.live) this.$("hand").open = true
      this.showHand()
    } else if (this.mode) {
      this.sound.seek(found.x * (this.run.seconds || this.sound.duration))
      this.tick()
    }
    this.overlay()
    this.tip()
  }
  describe() {
    const run = this.run,
      n = this.at,
      parts = [`${run.left[n]} of ${run.free} tokens left`]
    if (n)
      parts.push(
        `${run.fresh[n]} committed at this step` + (run.again[n] ? `, ${run.again[n]} masked again` : ""),
      )
    if (run.nfe.length) parts.push(`NFE ${run.nfe[n]}`)
    if (run.took.length) parts.push(`${run.took[n].toFixed(2)} s`)
    this.$("step").textContent = `step ${n} / ${run.steps}`
    this.$("readout").textContent = parts.join(" · ")
    this.$("slider").setAttribute(
      "aria-valuetext",
      `step ${n} of ${run.steps}, ${run.left[n]} of ${run.free} tokens left`,
    )
    this.$("over").setAttribute("aria-label", `token map: step ${n} of ${run.steps}, ${parts.join(", ")}`)
    this.root.dataset.step = n
  }

  // -- drawing

  resize() {
    const width = this.$("stage").clientWidth
    if (!width) return
    this.width = width
    this.left = width < 560 ? 50 : 74
    const single = this.runs.length === 1,
      has = (name, size) => (this.run[name]?.length ? size : 0)
    let y = 2
    const box = (name, height, gap = 4) => {
      const found = { y, height }
      if (height) y += height + gap
      return found
    }
    this.boxes = {
      words: box("words", has("words", 18), 2),
      phones: box("phones", width < 560 ? 0 : has("phones", 15)),
    }
    this.maps = this.runs.map(run => {
      const lines = (run.steps + 1) * run.codebooks,
        goal = (single ? 240 : 150) / lines
      if (!single) y += 15
      return box("map", Math.max(Math.round(lines * clamp(goal, 1, 16)), 12))
    })
    this.boxes.differ = box("differ", single ? 0 : 10)
    this.boxes.confidence = box("confidence", 34, 6)
    this.boxes.wave = box("wave", this.mode ? 54 : 0)
    this.boxes.spectrum = box("spectrum", this.mode ? 80 : 0)
    this.boxes.axis = box("axis", 36, 0)
    this.height = y
    this.scale = window.devicePixelRatio || 1
    for (const canvas of this.root.querySelectorAll("canvas")) {
      canvas.width = width * this.scale
      canvas.height = y * this.scale
      canvas.style.height = `${y}px`
    }
    this.legend()
    this.draw()
  }
  get longest() {
    return Math.max(...this.runs.map(run => run.width))
  }
  x(t) {
    return this.left + (t / this.longest) * (this.width - this.left - 8)
  } // seconds, or positions, to pixels
  span(run, p) {
    // where a place begins and ends
    const q = Math.floor(p / run.codebooks)
    return [this.x((q / run.positions) * run.width), this.x(((q + 1) / run.positions) * run.width)]
  }
  draw() {
    if (!this.width || !this.boxes) return
    const context = this.root.querySelector("canvas").getContext("2d")
    context.setTransform(this.scale, 0, 0, this.scale, 0, 0)
    context.clearRect(0, 0, this.width, this.height)
    this.context = context
    this.drawLabels()
    this.drawAxis()
    this.runs.forEach((run, i) => this.drawMap(run, i))
    if (this.runs.length > 1) this.drawDifference()
    this.drawConfidence()
    if (this.mode) {
      this.drawWave()
      this.drawSpectrum()
    }
    this.overlay()
  }
  text(text, x, y, { align = "left", color = this.theme.ink, size = 11, weight = "" } = {}) {
    const c = this.context
    c.font = `${weight} ${size}px system-ui, sans-serif`
    c.fillStyle = color
    c.textAlign = align
    c.textBaseline = "middle"
    c.fillText(text, x, y)
  }
  label(text, box) {
    if (box.height)
      this.text(text, this.left - 8, box.y + box.height / 2, { align: "right", color: this.theme.soft })
  }
  drawLabels() {
    const c = this.context,
      narrow = this.left < 60
    this.label("words", this.boxes.words)
    this.label("phones", this.boxes.phones)
    this.label("differ", this.boxes.differ)
    this.label(narrow ? "conf." : "confidence", this.boxes.confidence)
    this.label("wave", this.boxes.wave)
    for (const name of ["words", "phones"]) {
      const box = this.boxes[name]
      if (!box.height) continue
      for (const [text, start, end] of this.run[name]) {
        const a = this.x(start),
          b = this.x(end),
          fits = this.fit(text, b - a - 3, name === "words" ? 12 : 10)
        c.strokeStyle = this.theme.line
        c.lineWidth = 1
        c.beginPath()
        c.moveTo(a + 0.5, box.y + 2)
        c.lineTo(a + 0.5, box.y + box.height - 2)
        c.stroke()
        if (fits)
          this.text(fits, (a + b) / 2, box.y + box.height / 2, {
            align: "center",
            size: name === "words" ? 12 : 10,
            color: name === "words" ? this.theme.ink : this.theme.soft,
          })
      }
    }
  }
  fit(text, width, size) {
    this.context.font = `${size}px system-ui, sans-serif`
    if (this.context.measureText(text).width <= width) return text
    for (let n = text.length - 1; n > 1; n--)
      if (this.context.measureText(text.slice(0, n) + "…").width <= width) return text.slice(0, n) + "…"
    return ""
  }
  drawAxis() {
    const c = this.context,
      { y } = this.boxes.axis,
      seconds = this.runs[0].seconds
    const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500],
      room = (this.width - this.left) / 60
    const tick = steps.find(s => this.longest / s <= room && (seconds || s >= 1)) || 1000
    c.strokeStyle = this.theme.line
    c.beginPath()
    c.moveTo(this.left, y + 0.5)
    c.lineTo(this.x(this.longest), y + 0.5)
    for (let t = 0; t <= this.longest + 1e-6; t += tick) {
      const x = this.x(t)
      c.moveTo(x, y)
      c.lineTo(x, y + 4)
      this.text(tick < 1 ? t.toFixed(1) : Math.round(t), x, y + 15, {
        align: t ? "center" : "left",
        color: this.theme.soft,
      })
    }
    c.stroke()
    this.text(seconds ? "seconds" : "position", (this.left + this.x(this.longest)) / 2, y + 29, {
      align: "center",
      color: this.theme.soft,
    })
  }
  range(run) {
    // the largest entropy of a run, for the colours
    if (run.top === undefined) {
      run.top = 0.1
      for (const h of run.entropy) run.top = Math.max(run.top, h / 1000)
    }
    return run.top
  }
  paint(run, n, p) {
    // red, green, blue, opacity
    const i = n * run.places + p,
      state = run.state[i],
      colors = this.rgb()
    const masked = isMasked(state)
    if (this.color === "state") {
      if (state === GUESS) {
        const w = 0.3 + 0.7 * run.value("probability", n, p)
        return colors[MASKED].map((c, j) => c + w * (colors[GUESS][j] - c))
      }
      return colors[state]
    }
    if (masked) return colors[MASKED]
    if (state === GIVEN && this.color !== "token") return colors[GIVEN]
    const value = {
      "commit step": () => run.committed[i] / Math.max(run.steps, 1),
      confidence: () => run.value("probability", n, p),
      entropy: () => 1 - run.value("entropy", n, p) / this.range(run),
    }[this.color]
    if (!value) return hue(run.tokens[i])
    const v = value()
    return Number.isNaN(v) ? rgb(this.theme.soft) : ramp(v)
  }
  rgb() {
    return (this.theme.rgb ||= this.theme.state.map(rgb))
  }
  image(run) {
    // the whole map, one pixel a token; the part that is not yet there is not drawn
    const key = `map/${this.runs.indexOf(run)}/${this.color}`
    if (this.pictures[key]) return this.pictures[key]
    const rows = (run.steps + 1) * run.codebooks,
      image = new ImageData(run.positions, rows)
    for (let n = 0; n <= run.steps; n++)
      for (let p = 0; p < run.places; p++) {
        const q = p % run.codebooks,
          at = 4 * ((n * run.codebooks + q) * run.positions + (p - q) / run.codebooks)
        const [r, g, b] = this.paint(run, n, p)
        image.data[at] = r
        image.data[at + 1] = g
        image.data[at + 2] = b
        image.data[at + 3] = 255
      }
    return (this.pictures[key] = this.bitmap(image))
  }
  bitmap(image) {
    const canvas = document.createElement("canvas")
    canvas.width = image.width
    canvas.height = image.height
    canvas.getContext("2d").putImageData(image, 0, 0)
    return canvas
  }
  drawMap(run, i) {
    const c = this.context,
      box = this.maps[i],
      n = this.stepOf(run),
      rows = run.steps + 1,
      h = box.height / rows
    const a = this.x(0),
      b = this.x(run.width),
      shown = (n + 1) * run.codebooks,
      wide = (b - a) / run.positions
    if (this.runs.length > 1)
      this.text(
        `${"ABCDEFGH"[i]}  ${run.label}, step ${n} of ${run.steps}` +
          (i === this.active ? "  (playing)" : ""),
        a,
        box.y - 8,
        {
          color: i === this.active ? this.theme.ink : this.theme.soft,
          weight: i === this.active ? "600" : "",
        },
      )
    c.imageSmoothingEnabled = false
    c.drawImage(this.image(run), 0, 0, run.positions, shown, a, box.y, b - a, h * (n + 1))
    c.strokeStyle = this.theme.line
    c.setLineDash([1, 4])
    c.lineWidth = 1
    c.beginPath() // steps that are still to come
    const every = Math.max(1, Math.ceil(8 / h))
    for (let row = n + 1; row < rows; row += every) {
      const y = Math.round(box.y + (row + 0.5) * h) + 0.5
      c.moveTo(a, y)
      c.lineTo(b, y)
    }
    c.stroke()
    c.setLineDash([])
    c.strokeStyle = this.theme.page
    c.lineWidth = 0.5
    c.beginPath()
    if (wide > 4)
      for (let p = 1; p < run.positions; p++) {
        c.moveTo(a + p * wide, box.y)
        c.lineTo(a + p * wide, box.y + h * (n + 1))
      }
    if (h > 4)
      for (let row = 1; row <= n; row++) {
        c.moveTo(a, box.y + row * h)
        c.lineTo(b, box.y + row * h)
      }
    c.stroke()
    c.strokeStyle = this.theme.ink
    c.lineWidth = 1.5
    c.strokeRect(a - 1, box.y + n * h - 0.5, b - a + 2, Math.max(h, 2) + 1)
    const apart = Math.max(1, Math.ceil(13 / h))
    for (let row = 0; row < rows; row += apart)
      if (row === n || Math.abs(row - n) >= apart)
        this.text(row, this.left - 8, box.y + (row + 0.5) * h, { align: "right", color: this.theme.soft })
    this.text(this.left < 60 ? n : `step ${n}`, this.left - 8, box.y + (n + 0.5) * h, { align: "right", weight: "600" })
    this.drawByHand(run, box, n, h)
    if (this.other && run === this.run) this.drawPreview(run, box, n, h)
  }
  drawByHand(run, box, n, h) {
    // tokens that a person set: framed in the rows where they were, filled where they wait for the model
    const c = this.context,
      sub = h / run.codebooks
    const frame = (row, p, token) => {
      const [a, b] = this.span(run, p),
        y = box.y + row * h + (p % run.codebooks) * sub
      if (token !== undefined) {
        c.fillStyle = this.theme.state[token === run.mask_id ? MASKED : GIVEN]
        c.fillRect(a, y, b - a, sub)
      }
      c.strokeStyle = this.theme.ink
      c.lineWidth = 1.5
      c.strokeRect(a, y, Math.max(b - a, 2), Math.max(sub, 2))
    }
    for (const [row, p] of run.by_hand) if (row <= n) frame(row, p)
    for (const [p, token] of this.edits[`${this.runs.indexOf(run)}/${n}`] || []) frame(n, p, token)
  }
  drawPreview(run, box, n, h) {
    const c = this.context,
      sub = h / run.codebooks
    for (const { p, same } of this.other) {
      const [a, b] = this.span(run, p),
        y = box.y + n * h + (p % run.codebooks) * sub
      c.strokeStyle = same ? this.theme.ink : this.theme.state[REMASKED]
      c.lineWidth = 2
      c.strokeRect(a + 1, y + 1, Math.max(b - a - 2, 1), Math.max(sub - 2, 2))
    }
  }
  drawDifference() {
    // where the runs hold different tokens, at the steps that are shown
    const c = this.context,
      box = this.boxes.differ,
      first = this.runs[0],
      n = this.stepOf(first)
    this.differing = 0
    for (const run of this.runs.slice(1)) {
      const m = this.stepOf(run)
      for (let p = 0; p < Math.min(first.places, run.places); p++) {
        const one = first.tokens[n * first.places + p],
          two = run.tokens[m * run.places + p]
        if (one === two) continue
        const [a, b] = this.span(first, p),
          both = one !== first.mask_id && two !== run.mask_id
        c.fillStyle = this.theme.state[both ? REMASKED : MASKED] // another token; masked in one of them
        c.fillRect(a, box.y, Math.max(b - a - 0.5, 1), box.height)
        this.differing += both
      }
    }
    c.strokeStyle = this.theme.line
    c.lineWidth = 1
    c.strokeRect(this.left + 0.5, box.y + 0.5, this.x(first.width) - this.left - 1, box.height - 1)
  }
  drawConfidence() {
    const c = this.context,
      box = this.boxes.confidence,
      run = this.run,
      n = this.at,
      right = this.x(run.width)
    c.strokeStyle = this.theme.line
    c.lineWidth = 1
    c.beginPath()
    for (const y of [box.y + 0.5, box.y + box.height - 0.5]) {
      c.moveTo(this.left, y)
      c.lineTo(right, y)
    }
    c.stroke()
    this.text("1", this.left - 2, box.y + 4, { align: "right", color: this.theme.soft, size: 9 })
    this.text("0", this.left - 2, box.y + box.height - 3, {
      align: "right",
      color: this.theme.soft,
      size: 9,
    })
    for (let p = 0; p < run.places; p++) {
      const v = run.value("probability", n, p),
        [a, b] = this.span(run, p),
        sub = (b - a) / run.codebooks
      if (Number.isNaN(v)) continue
      c.fillStyle = this.theme.state[run.state[n * run.places + p]]
      c.fillRect(
        a + (p % run.codebooks) * sub,
        box.y + box.height - v * box.height,
        Math.max(sub - 0.5, 0.6),
        v * box.height,
      )
    }
  }
  drawWave() {
    const c = this.context,
      box = this.boxes.wave,
      run = this.run,
      buffer = this.buffers[this.key_()],
      middle = box.y + box.height / 2
    c.fillStyle = this.theme.line
    c.fillRect(this.left, middle - 0.25, this.x(run.width) - this.left, 0.5)
    if (!buffer) return this.waiting(box)
    const wave = buffer.getChannelData(0),
      right = this.x(run.width),
      n = this.at,
      total = run.seconds * RATE || wave.length
    let top = 0.05
    for (let i = 0; i < wave.length; i += 3) top = Math.max(top, Math.abs(wave[i]))
    for (let x = Math.floor(this.left); x < right; x++) {
      const from = Math.floor(((x - this.left) / (right - this.left)) * total),
        to = Math.min(Math.ceil(((x + 1 - this.left) / (right - this.left)) * total), wave.length)
      let low = 0,
        high = 0
      for (let i = from; i < to; i++) {
        if (wave[i] < low) low = wave[i]
        if (wave[i] > high) high = wave[i]
      }
      const q = clamp(
        Math.floor(((x - this.left) / (right - this.left)) * run.positions),
        0,
        run.positions - 1,
      )
      c.fillStyle = this.theme.state[run.state[n * run.places + q * run.codebooks]]
      c.fillRect(
        x,
        middle - ((high / top) * box.height) / 2,
        1,
        Math.max((((high - low) / top) * box.height) / 2, 0.6),
      )
    }
  }
  waiting(box) {
    const failed = this.failures[this.key_()]
    this.text(
      failed ? "no sound" : "sound is being made …",
      (this.left + this.x(this.run.width)) / 2,
      box.y + box.height / 2 - 8,
      { align: "center", color: this.theme.soft },
    )
  }
  drawSpectrum() {
    const c = this.context,
      box = this.boxes.spectrum,
      key = this.key_(),
      buffer = this.buffers[key]
    for (const [name, share] of [
      ["8 kHz", 0.07],
      ["0", 0.95],
    ])
      this.text(name, this.left - 8, box.y + share * box.height, {
        align: "right",
        color: this.theme.soft,
        size: 10,
      })
    c.strokeStyle = this.theme.line
    c.lineWidth = 1
    c.strokeRect(this.left + 0.5, box.y + 0.5, this.x(this.run.width) - this.left - 1, box.height - 1)
    if (!buffer) return
    const picture = (this.pictures[`sound/${key}`] ||= this.spectrumImage(buffer.getChannelData(0)))
    c.imageSmoothingEnabled = true
    c.drawImage(
      picture,
      this.left,
      box.y,
      this.x(this.run.seconds ? buffer.duration : this.run.width) - this.left,
      box.height,
    )
  }
  spectrumImage(wave) {
    const { frames, values } = spectrogram(wave),
      image = new ImageData(frames, BANDS),
      [r, g, b] = rgb(this.theme.ink)
    for (let t = 0; t < frames; t++)
      for (let k = 0; k < BANDS; k++) {
        const at = 4 * ((BANDS - 1 - k) * frames + t)
        image.data[at] = r
        image.data[at + 1] = g
        image.data[at + 2] = b
        image.data[at + 3] = 255 * values[t * BANDS + k] ** 1.6
      }
    return this.bitmap(image)
  }
  overlay() {
    // what moves: the playhead, the place under the pointer, the one that was chosen
    if (!this.width || !this.boxes) return
    const c = this.$("over").getContext("2d")
    c.setTransform(this.scale, 0, 0, this.scale, 0, 0)
    c.clearRect(0, 0, this.width, this.height)
    const low = this.boxes.axis.y,
      mark = (p, run, alpha) => {
        const [a, b] = this.span(run, p)
        c.globalAlpha = alpha
        c.fillStyle = this.theme.ink
        c.fillRect(a, 0, Math.max(b - a, 1), low)
        c.globalAlpha = 1
      }
    if (this.selected !== null && this.selected < this.run.places) mark(this.selected, this.run, 0.22)
    if (this.drag) {
      const run = this.drag.from.run || this.run,
        [first, last] = this.dragSpan()
      c.globalAlpha = 0.3
      c.fillStyle = this.theme.state[REMASKED]
      c.fillRect(
        this.span(run, first * run.codebooks)[0],
        0,
        this.span(run, last * run.codebooks)[1] - this.span(run, first * run.codebooks)[0],
        low,
      )
      c.globalAlpha = 1
    } else if (this.hover?.place !== undefined) mark(this.hover.place, this.hover.run, 0.12)
    if (!this.mode) return
    const x = this.x(
      this.run.seconds
        ? Math.min(this.sound.time, this.run.width)
        : (this.sound.time / (this.sound.duration || 1)) * this.run.width,
    )
    c.strokeStyle = this.theme.state[REMASKED]
    c.fillStyle = c.strokeStyle
    c.lineWidth = 1.5
    c.beginPath()
    c.moveTo(x, 0)
    c.lineTo(x, low)
    c.stroke()
    c.beginPath()
    c.moveTo(x - 5, low + 7)
    c.lineTo(x + 5, low + 7)
    c.lineTo(x, low)
    c.fill()
  }

  // -- what is under the pointer

  find(event) {
    const frame = this.$("over").getBoundingClientRect(),
      x = event.clientX - frame.left,
      y = event.clientY - frame.top
    for (const [i, box] of this.maps.entries()) {
      const run = this.runs[i],
        share = (x - this.left) / (this.x(run.width) - this.left)
      if (y < box.y || y >= box.y + box.height || share < 0 || share >= 1) continue
      const line = Math.floor(((y - box.y) / box.height) * (run.steps + 1) * run.codebooks)
      return {
        run,
        row: Math.floor(line / run.codebooks),
        place: Math.floor(share * run.positions) * run.codebooks + (line % run.codebooks),
        at: x,
        px: x,
        py: y,
      }
    }
    const share = (x - this.left) / (this.x(this.run.width) - this.left)
    if (share < 0 || share > 1) return null
    for (const [word, start] of y < this.boxes.words.y + this.boxes.words.height
      ? [...(this.run.words || [])].reverse()
      : [])
      if (this.x(start) <= x) return { x: start / this.run.width, word, at: x }
    return {
      x: share,
      place: clamp(Math.floor(share * this.run.positions), 0, this.run.positions - 1) * this.run.codebooks,
      run: this.run,
      at: x,
      px: x,
      py: y,
    }
  }
  tip() {
    const tip = this.$("tip"),
      found =
        this.hover?.place !== undefined
          ? this.hover
          : this.selected !== null && !(this.run.live && this.$("hand").open)
            ? { place: this.selected, run: this.run }
            : null
    tip.hidden = !found
    if (!found) return
    const { run, place } = found,
      n = found.row === undefined ? this.stepOf(run) : found.row
    tip.replaceChildren(...this.facts(run, n, place))
    const [a, b] = this.span(run, place),
      box = this.maps[this.runs.indexOf(run)]
    const x = a - this.width / 2 > 0 ? a - 226 : b + 8
    tip.style.left = `${clamp(x, 0, this.width - 220)}px`
    tip.style.top = `${clamp(found.py === undefined ? box.y : found.py + 14, 0, Math.max(this.height - tip.offsetHeight - 4, 0))}px`
  }
  facts(run, n, p) {
    const line = text => {
      const div = document.createElement("div")
      div.textContent = text
      return div
    }
    const i = n * run.places + p,
      state = run.state[i],
      last = run.steps * run.places + p
    const lines = [this.where(run, p)]
    const future = n > this.stepOf(run),
      masked = isMasked(state)
    lines.push(
      `step ${n}: ${future ? "not yet reached" : STATES[state]}${masked || future ? "" : ` · token ${run.tokens[i]}`}`,
    )
    const entropy = run.value("entropy", n, p),
      probability = run.value("probability", n, p)
    if (!future && !masked && !Number.isNaN(probability))
      lines.push(
        `probability ${percent(probability)}` +
          (Number.isNaN(entropy) ? "" : ` · entropy ${entropy.toFixed(2)} nats`),
      )
    if (!future && masked && !Number.isNaN(entropy)) lines.push(`entropy ${entropy.toFixed(2)} nats`)
    if (run.committed[last] > 0) lines.push(`committed at step ${run.committed[last]}`)
    const call = masked ? n : run.committed[i] - 1,
      out = lines.map(line)
    if (!future && run.candidates && call >= 0 && run.asked(call, p))
      out.push(this.alternatives(run, call, p, masked ? -1 : run.tokens[i]))
    return out
  }
  where(run, p) {
    // position, time, word and phone of a place
    const q = Math.floor(p / run.codebooks),
      from = (q / run.positions) * run.width,
      to = from + run.width / run.positions
    const under = list => (list || []).find(([, a, b]) => a <= (from + to) / 2 && (from + to) / 2 < b)?.[0]
    return [
      `position ${q}${run.codebooks > 1 ? `, codebook ${p % run.codebooks}` : ""}`,
      run.seconds ? `${from.toFixed(2)}–${to.toFixed(2)} s` : "",
      under(run.words),
      under(run.phones),
    ]
      .filter(Boolean)
      .join(" · ")
  }
  alternatives(run, call, p, token) {
    const table = document.createElement("table")
    for (const [id, q] of run.best(call, p, 5)) {
      const row = table.insertRow(),
        bar = document.createElement("b")
      row.insertCell().textContent = id
      row.insertCell().textContent = percent(q)
      bar.style.width = `${100 * q}%`
      if (id === token) bar.style.background = this.theme.state[NEW]
      row.insertCell().append(bar)
    }
    return table
  }
  legend() {
    const swatch = (color, text) => {
      const span = document.createElement("span"),
        i = document.createElement("i")
      i.style.background = color
      span.append(i, text)
      return span
    }
    const colors = this.theme.state,
      parts = [],
      has = state => this.runs.some(run => run.state.includes(state))
    if (this.color === "state")
      for (const s of [MASKED, GUESS, GIVEN, NEW, COMMITTED, REMASKED]) {
        if (has(s)) parts.push(swatch(colors[s], STATES[s]))
      }
    if (this.color === "state" && this.runs.some(run => run.by_hand.length)) {
      parts.push(swatch(colors[GIVEN], "set by hand"))
      parts.at(-1).firstChild.className = "ds-framed"
    }
    if (this.color !== "state") {
      parts.push(swatch(colors[MASKED], "masked"))
      if (has(GIVEN) && this.color !== "token") parts.push(swatch(colors[GIVEN], "given"))
      const ends = {
        "commit step": ["step 0", `${this.main.steps}`],
        confidence: ["0", "1"],
        entropy: [`${this.range(this.main).toFixed(1)} nats`, "0"],
      }[this.color]
      if (ends) {
        const span = document.createElement("span"),
          bar = document.createElement("i")
        bar.className = "ds-ramp"
        bar.style.background = `linear-gradient(90deg, ${VIRIDIS.map(c => `rgb(${c})`).join(", ")})`
        span.append(ends[0], bar, ends[1])
        parts.push(span)
      } else parts.push("one colour a token")
    }
    this.$("legend").replaceChildren(...parts)
  }
  close() {
    this.timer && clearInterval(this.timer)
    this.unwatch?.()
    this.sound?.close()
  }
}

function render({ model, el }) {
  const view = new View(el, model)
  return () => view.close()
}

export default { render }
