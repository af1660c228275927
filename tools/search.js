// The search of the docs, in the place of Fuse: by words, and not by letters. A query's words must all begin a
// word of the section; whole words count more than beginnings, titles and headings more than text.

const SAME = { // what people call it -> how the pages write it
  wer: ["word error", "words wrong", "of the words"],
  cer: ["character error"],
  mos: ["distillmos", "utmos"],
  asr: ["recognizer", "recogniser", "whisper"],
  tts: ["synthesize", "synthesis"],
  cfg: ["guidance"],
  nfe: ["calls of the network"],
}
const split = text => text.toLowerCase().match(/[\p{L}\p{N}]+/gu) || []
const stem = word => (word.length > 5 ? word.replace(/(ing|ed|es|s)$/, "") : word)

window.Fuse = class {
  constructor(entries) {
    this.entries = entries.map(item => ({
      item,
      title: split(item.title),
      section: split(item.section || ""),
      text: split(item.text),
      all: `${item.title} ${item.section || ""} ${item.text}`.toLowerCase(),
    }))
  }
  score(entry, word) {
    // 0: it is not there
    const begin = stem(word),
      of = (words, weight) => {
        let best = 0,
          count = 0
        for (const w of words)
          if (w.startsWith(begin)) {
            const now = w === word ? 1 : stem(w) === begin ? 0.8 : 0.25
            best = Math.max(best, now)
            count += now
          }
        return weight * best * (1 + Math.log1p(count) / 4)
      }
    const other = (SAME[word] || []).some(phrase => entry.all.includes(phrase)) ? 1.5 : 0
    return Math.max(of(entry.title, 8), of(entry.section, 6), of(entry.text, 2), other)
  }
  search(query, { limit = 20 } = {}) {
    const words = split(query),
      phrase = words.join(" "),
      found = []
    for (const entry of this.entries) {
      const scores = words.map(word => this.score(entry, word))
      if (!scores.length || scores.some(score => !score)) continue
      const together = words.length > 1 && entry.all.includes(phrase) ? 12 : 0
      found.push({ item: entry.item, score: together + scores.reduce((a, b) => a + b) })
    }
    const ofPage = {}
    for (const one of found.sort((a, b) => b.score - a.score)) {
      // two sections of a page, then those of the next; the rest after all of them
      ofPage[one.item.title] = (ofPage[one.item.title] || 0) + 1
      one.later = ofPage[one.item.title] > 2
    }
    return [...found.filter(one => !one.later), ...found.filter(one => one.later)].slice(0, limit)
  }
}
