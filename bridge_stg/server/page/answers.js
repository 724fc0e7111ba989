// What was found: a row a query with its colour, its span on a track, the span's ends to go to, and its scores.

import { clock, endsOf, occurrencesOf, partsOf } from "./boxes.js";
import { make } from "./elements.js";
import { colourOf } from "./palette.js";
import { followPointer, part } from "./scrubber.js";

const SCORES = {
  answer: "probability of the answer among all that were possible",
  presence: "mean probability that the target is in the frame, over the boxes",
  absent: "probability that the target is not in the video at all",
};

export class Answers {
  /**
   * @param {HTMLOListElement} list
   * @param {{onSeek: (time: number) => void, onHide: (index: number, hidden: boolean) => void}} actions
   */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    this.groundings = [];
    this.ends = [];
  }

  /**
   * @param {Array} groundings as the server gives them.
   * @param {{durationS: number, frameS: number}} video
   * @param {boolean} live whether they are about now.
   */
  show(groundings, video, live = false) {
    this.live = live;
    this.kind = video.durationS > 0 ? "video" : "image";
    this.groundings = groundings;
    this.ends = groundings.map((grounding) => occurrencesOf(grounding).map((one) => endsOf(one, video.frameS)));
    this.list.replaceChildren(...groundings.map((grounding, index) => this.#row(grounding, index, video)));
  }

  clear() {
    this.show([], { durationS: 0, frameS: 0.04 });
  }

  setTime(time, durationS) {
    this.list.style.setProperty("--at", part(time, durationS));
  }

  /** Return where the spans begin and end, in order of time. */
  get seams() {
    return [...new Set(this.ends.flat(2))].sort((a, b) => a - b);
  }

  /** Return a sentence for those who cannot see the rows. */
  get summary() {
    const found = this.groundings.filter((grounding) => grounding.found).length;
    if (this.groundings.length === 1) return found ? "Found it." : `It is not in this ${this.kind}.`;
    return found ? `Found ${found} of ${this.groundings.length}.` : `None of them is in this ${this.kind}.`;
  }

  #row(grounding, index, video) {
    const [ends] = this.ends[index];
    const row = make("li.answer", {}, this.#head(grounding, index, ends, video));
    row.style.setProperty("--colour", colourOf(index));
    if (video.durationS > 0) row.append(this.#track(grounding, this.ends[index].flat(), video.durationS));
    if (this.ends[index].length > 1) row.append(this.#others(grounding, index));
    row.append(details(grounding));
    if (grounding.clock === "guessed") row.append(make("p.note", {}, "Times are guessed where the file has no usable time stamps."));
    const unknown = grounding.unknown_words ?? [];
    if (unknown.length > 0) row.append(make("p.quiet", {}, `Words that this model does not know: ${unknown.join(", ")}`));
    if (!grounding.found) row.classList.add("absent");
    return row;
  }

  #head(grounding, index, ends, video) {
    const number = String(index + 1);
    // Live rows are made anew with every round, which would take the focus from a button.
    const swatch = grounding.boxes && !this.live ? this.#toggle(number, index) : make("span.number", { "aria-hidden": "true" }, number);
    const head = make("div.answer-head", {}, swatch, make("span.answer-text", {}, grounding.query));
    if (!grounding.found) head.append(make("span.verdict", {}, this.live ? "not there now" : `not in this ${this.kind}`));
    else if (video.durationS > 0) head.append(this.#when(grounding, ends));
    else head.append(make("span.verdict", {}, this.live ? "there now" : "found"));
    return head;
  }

  #toggle(number, index) {
    const label = (shown) => `Box of query ${number}: ${shown ? "shown" : "hidden"}`;
    const swatch = make("button.number", { type: "button", title: "Show or hide its box" }, number);
    swatch.setAttribute("aria-pressed", "true");
    swatch.setAttribute("aria-label", label(true));
    swatch.addEventListener("click", () => {
      const shown = swatch.getAttribute("aria-pressed") !== "true";
      swatch.setAttribute("aria-pressed", String(shown));
      swatch.setAttribute("aria-label", label(shown));
      this.actions.onHide(index, !shown);
    });
    return swatch;
  }

  #when({ span }, [first, last]) {
    const go = (time, shown, what) => {
      const button = make("button.go", { type: "button", title: `Go to the ${what} of the span` }, clock(shown));
      button.setAttribute("aria-label", `${clock(shown)}: go to the ${what}`);
      button.addEventListener("click", () => this.actions.onSeek(time));
      return button;
    };
    return make("span.when", {}, go(first, span.start_s, "start"), "–", go(last, span.end_s, "end"));
  }

  /** Return the spans of the other occurrences, in order of time. */
  #others(grounding, index) {
    const others = occurrencesOf(grounding).map((one, place) => ({ ...one, ends: this.ends[index][place] })).slice(1);
    others.sort((a, b) => a.span.start_s - b.span.start_s);
    const items = others.map((one) => make("li", { title: `score ${one.score.toFixed(2)}` }, this.#when(one, one.ends)));
    return make("details.others", {}, make("summary", {}, `${others.length} more`), make("ol", {}, ...items));
  }

  #track(grounding, ends, durationS) {
    const track = make("div.track", { "aria-hidden": "true" });
    for (const { start, end, visible } of occurrencesOf(grounding).flatMap(partsOf)) {
      const piece = make(visible ? "div.span" : "div.span.doubted");
      piece.style.setProperty("--from", part(start, durationS));
      piece.style.setProperty("--to", part(end, durationS));
      track.append(piece);
    }
    track.append(make("div.playhead"));
    followPointer(track, track, () => durationS, () => ends, this.actions.onSeek);
    return track;
  }
}

/** Return the scores and, for text heads, which compute no presence, the mode and the calls of the language model. */
function details({ scores, heads, mode, decoding }) {
  const list = make("dl.scores");
  const add = (name, meaning, text) => list.append(make("div", { title: meaning }, make("dt", {}, name), make("dd", {}, text)));
  for (const [name, meaning] of Object.entries(SCORES)) {
    if (name in scores && !(heads === "text" && name === "presence")) add(name, meaning, (Math.round(100 * scores[name]) / 100).toFixed(2));
  }
  if (heads !== "text") return list;
  add("mode", "how text heads found the answer", mode);
  add("calls", "calls of the language model", String(decoding.calls));
  return list;
}
