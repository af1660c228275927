// A blind listening test: play what is behind the letters, decide, go on. Keys: a, b, c, ... x, r, space, enter.

const PAGE = `
  <div class="ds-row ds-head"><span class="ds-title"></span><span class="ds-soft ds-count" role="status"></span></div>
  <div class="ds-row ds-sounds"></div>
  <div class="ds-row ds-choice-row"></div>
  <div class="ds-row"><button class="ds-back" title="take the last answer back">back</button>
    <button class="ds-next" title="write the answer down, and go on (enter)" disabled>next</button>
    <span class="ds-soft ds-hint"></span></div>
  <div class="ds-message" role="alert"></div>`

class Test {
  constructor(el, model) {
    this.model = model
    this.root = document.createElement("div")
    this.root.className = "ds-player ds-listen-test"
    this.root.classList.toggle("ds-dark", isDark(el))
    this.root.dataset.lmSuppressShortcuts = "true"
    this.root.tabIndex = 0
    this.root.innerHTML = PAGE
    el.replaceChildren(this.root)
    this.buffers = {}
    this.$("next").addEventListener("click", () => this.next())
    this.$("back").addEventListener("click", () => this.model.send({ type: "back" }))
    this.root.addEventListener("keydown", event => this.key(event))
    model.on("msg:custom", (message, buffers) => this.receive(message, buffers))
    model.on("change:data", () => this.show())
    this.show()
    model.send({ type: "ready" })
  }
  $(name) {
    return this.root.querySelector(`.ds-${name}`)
  }
  get data() {
    return this.model.get("data")
  }
  get choices() {
    // the letters that are judged: X and the open reference are only played
    return this.data.labels.filter(label => label !== "X" && label !== "reference")
  }
  show() {
    const { kind, question, trial, trials, labels, saved } = this.data
    this.stop()
    this.value = null
    this.sent = false // answered, until the kernel shows a trial or says what went wrong
    this.played = new Set()
    this.buffers = {}
    this.root.dataset.trial = trial
    this.$("title").textContent = labels.length ? question : "Thank you: all trials are answered."
    this.$("count").textContent = labels.length ? `trial ${trial + 1} of ${trials}` : `answers are in ${saved}`
    this.$("back").disabled = !trial
    this.$("sounds").replaceChildren(
      ...labels.map(label => {
        const button = document.createElement("button")
        button.textContent = `▶ ${label}`
        button.dataset.label = label
        button.disabled = true
        button.title = `play ${label} (${label === "reference" ? "r" : label.toLowerCase()}), at the same place`
        button.addEventListener("click", () => this.play(label))
        return button
      }),
    )
    this.$("choice-row").replaceChildren(...(kind === "mushra" ? this.sliders() : this.buttons(kind)))
    this.enable()
  }
  buttons(kind) {
    const button = (text, value) => {
      const found = document.createElement("button")
      found.textContent = text
      found.dataset.value = JSON.stringify(value)
      found.setAttribute("aria-pressed", "false")
      found.addEventListener("click", () => this.choose(value))
      return found
    }
    if (!this.choices.length) return []
    const rows = this.choices.map((label, i) => button(kind === "abx" ? `X is ${label}` : `${label} is better`, i))
    if (kind === "ab") rows.push(button("alike", null))
    return rows
  }
  sliders() {
    return this.choices.map(label => {
      const box = document.createElement("label"),
        slider = document.createElement("input"),
        number = document.createElement("span")
      Object.assign(slider, { type: "range", min: 0, max: 100, step: 1, value: 50 })
      slider.setAttribute("aria-label", `grade of ${label}`)
      number.textContent = "–"
      slider.addEventListener("input", () => {
        number.textContent = slider.value
        slider.dataset.set = "true"
        this.enable()
      })
      box.append(`${label} `, slider, number)
      return box
    })
  }
  choose(value) {
    this.value = { value }
    for (const button of this.$("choice-row").children)
      button.setAttribute("aria-pressed", button.dataset.value === JSON.stringify(value))
    this.enable()
  }
  get answer() {
    // {value}, or null while there is none
    if (this.data.kind !== "mushra") return this.value
    const sliders = [...this.$("choice-row").querySelectorAll("input")]
    if (!sliders.length || sliders.some(s => !s.dataset.set)) return null
    return { value: sliders.map(s => Number(s.value)) }
  }
  enable() {
    const left = this.data.labels.filter(label => !this.played.has(label))
    this.$("next").disabled = Boolean(this.sent || !this.data.labels.length || left.length || !this.answer)
    this.$("hint").textContent = !this.data.labels.length ? "" : left.length ? `still to be played: ${left.join(", ")}` : ""
  }
  async receive(message, buffers) {
    this.$("message").textContent = message.type === "message" ? message.text : ""
    if (message.type === "message") {
      this.sent = false
      this.enable()
    }
    if (message.type !== "sounds" || message.trial !== this.data.trial) return
    for (const [i, label] of message.labels.entries()) {
      const bytes = buffers[i],
        data = bytes.buffer ? bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) : bytes
      this.buffers[label] = await new OfflineAudioContext(1, 1, 16000).decodeAudioData(data)
    }
    for (const button of this.$("sounds").children) button.disabled = !this.buffers[button.dataset.label]
    this.root.dataset.ready = message.trial
  }
  play(label) {
    const buffer = this.buffers[label]
    if (!buffer) return
    this.context ||= new AudioContext()
    this.context.resume()
    const passed = this.node ? this.context.currentTime - this.began : 0, // another sound goes on at the same place
      from = this.node && passed < buffer.duration ? passed : 0
    this.stop()
    const node = this.context.createBufferSource()
    node.buffer = buffer
    node.connect(this.context.destination)
    node.start(0, from)
    node.onended = () => {
      if (this.node === node) this.stop()
    }
    Object.assign(this, { node, began: this.context.currentTime - from })
    this.played.add(label)
    for (const button of this.$("sounds").children) button.setAttribute("aria-pressed", button.dataset.label === label)
    this.enable()
  }
  stop() {
    const node = this.node
    this.node = null
    node?.stop()
    for (const button of this.$("sounds").children) button.setAttribute("aria-pressed", "false")
  }
  next() {
    if (this.$("next").disabled) return
    this.model.send({ type: "answer", value: this.answer.value })
    this.sent = true
    this.enable()
    this.root.focus()
  }
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return
    const label = event.key === "r" ? "reference" : event.key.toUpperCase(),
      number = Number(event.key)
    if (this.data.labels.includes(label)) this.play(label)
    else if (event.key === "Enter") this.next()
    else if (event.key === " " && !event.target.matches("button")) this.stop()
    else if (this.data.kind !== "mushra" && number >= 1 && number <= this.choices.length) this.choose(number - 1)
    else if (this.data.kind === "ab" && event.key === "0") this.choose(null)
    else return
    event.preventDefault()
    event.stopPropagation()
  }
}

function render({ model, el }) {
  const test = new Test(el, model)
  return () => {
    test.stop()
    test.context?.close()
  }
}

export default { render }
