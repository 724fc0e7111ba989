// Watching a live source: its frames, where the targets of the queries are, and the events.

import { sleep } from "./api.js";
import { clock } from "./boxes.js";
import { make } from "./elements.js";
import { colourOf } from "./palette.js";

const FRAME_MS = 200;
/** Frames that may wait for their answers: some seconds of them. */
const MOST_WAITING = 50;
/** Seconds by which the delay shrinks per frame while it is longer than necessary. */
const CATCH_UP_S = 0.01;
const MOST_EVENTS = 200;
/** By how much a span may end before what is known and still be of now: about a group of coarse frames. */
const SETTLE_S = 0.75;

/**
 * Shows a live source's frames as often as the server sends one, delayed until their boxes are known: a moving target
 * has left the box of a second ago. Has the interface of the other players.
 */
export class LivePlayer extends EventTarget {
  /** @param {() => Promise<{time: number, blob: Blob}|null>} fetchFrame gets the newest frame; null: there is none. */
  constructor(fetchFrame) {
    super();
    this.element = make("canvas", { role: "img", "aria-label": "The live frame" });
    this.isVideo = false;
    this.playing = false;
    this.durationS = 0;
    this.frameS = 0.04;
    this.shown = { time: 0, exact: true };
    this.image = { width: 16, height: 9 };
    this.fetchFrame = fetchFrame;
    this.waiting = [];
    this.knownS = 0;
    this.lagS = 0;
  }

  /** Set the time of the stream up to which the answers are known. */
  know(time) {
    if (time < this.knownS) this.waiting = []; // it is watched anew, from its start
    this.knownS = time;
  }

  /** Get frames from now on, unless that is done already; the server has them while the source is watched. */
  async follow() {
    if (this.following) return;
    this.following = true;
    while (!this.destroyed && (await this.#showNext())) await sleep(FRAME_MS);
    this.following = false;
  }

  /** Set the source's size in pixels while there is no frame to take it from. */
  setSize({ width, height }) {
    if (this.hasFrame || (this.image.width === width && this.image.height === height)) return;
    this.image = { width, height };
    Object.assign(this.element, this.image);
    this.dispatchEvent(new Event("frame"));
  }

  setRecord() {}
  play() {}
  pause() {}
  seek() {}

  destroy() {
    this.destroyed = true;
    this.element.remove();
  }

  /** Return whether there was a frame. */
  async #showNext() {
    const newest = await this.fetchFrame();
    if (newest === null || this.destroyed) return false;
    this.waiting.push({ time: newest.time, bitmap: await createImageBitmap(newest.blob) });
    this.lagS = Math.max(newest.time - this.knownS, this.lagS - CATCH_UP_S);
    const until = Math.min(newest.time - this.lagS, this.knownS);
    const due = this.waiting.filter(({ time }) => time <= until).length;
    if (due > 0 || !this.hasFrame || this.waiting.length > MOST_WAITING) this.#draw(Math.max(due, 1));
    return true;
  }

  /** Draw the last of the frames that are due. */
  #draw(due) {
    const frames = this.waiting.splice(0, due);
    const { time, bitmap } = frames[due - 1];
    this.hasFrame = true;
    this.shown = { time, exact: true };
    this.image = { width: bitmap.width, height: bitmap.height };
    Object.assign(this.element, this.image);
    this.element.getContext("2d").drawImage(bitmap, 0, 0);
    for (const frame of frames) frame.bitmap.close();
    this.dispatchEvent(new Event("frame"));
  }
}

/** Return groundings of one moment, as they are listed: the newest box of each target that is there now. */
export function present(update) {
  return update.groundings.map((grounding) => {
    const last = grounding.boxes?.[grounding.boxes.length - 1];
    const there = last && grounding.span.end_s >= update.known_s - SETTLE_S;
    return { ...grounding, found: Boolean(there), boxes: there ? [{ ...last, time_s: 0, interpolated: false }] : null };
  });
}

/** Put the events of an update on top of the list. */
export function noteEvents(list, update, queries) {
  for (const event of update.events) {
    const index = queries.indexOf(event.query);
    const number = make("span.number", { "aria-hidden": "true" }, String(index + 1));
    const text = make("span.answer-text", {}, `${event.query} `, make("b", {}, event.event));
    const row = make("li", {}, number, text, make("span.verdict", {}, clock(event.time_s)));
    row.style.setProperty("--colour", colourOf(Math.max(0, index)));
    list.prepend(row);
  }
  while (list.children.length > MOST_EVENTS) list.lastElementChild.remove();
}
