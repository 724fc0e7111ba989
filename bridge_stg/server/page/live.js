// Watching a live source: its pictures, where the targets of the queries are, and what happened.

import { sleep } from "./api.js";
import { clock } from "./boxes.js";
import { make } from "./elements.js";
import { colourOf } from "./palette.js";

const PICTURE_MS = 200;
/** Pictures that may wait for their answers: some seconds of them. */
const MOST_WAITING = 50;
/** By how much the delay shrinks with a picture where it was longer than need be, in seconds. */
const CATCH_UP_S = 0.01;
const MOST_EVENTS = 200;
/** By how much a span may end before what is known and still be of now: about a group of coarse frames. */
const SETTLE_S = 0.75;

/**
 * Shows a live source's pictures, as often as the server gives one, so much later that the boxes in them are known: what
 * moves has left the box of a second ago. Has the interface of the other players.
 */
export class LivePlayer extends EventTarget {
  /** @param {() => Promise<{time: number, blob: Blob}|null>} fetchPicture gets the newest; null: there is none. */
  constructor(fetchPicture) {
    super();
    this.element = make("canvas", { role: "img", "aria-label": "The live picture" });
    this.isVideo = false;
    this.playing = false;
    this.durationS = 0;
    this.frameS = 0.04;
    this.shown = { time: 0, exact: true };
    this.picture = { width: 16, height: 9 };
    this.fetchPicture = fetchPicture;
    this.waiting = [];
    this.knownS = 0;
    this.lagS = 0;
  }

  /** Take up to which time of the stream the answers know it. */
  know(time) {
    if (time < this.knownS) this.waiting = []; // it is watched anew, from its start
    this.knownS = time;
  }

  /** Get pictures from now on, if that is not done already; the server has them while the source is watched. */
  async follow() {
    if (this.following) return;
    this.following = true;
    while (!this.destroyed && (await this.#showNext())) await sleep(PICTURE_MS);
    this.following = false;
  }

  /** Take the source's size in pixels where there is no picture to tell it. */
  setSize({ width, height }) {
    if (this.pictured || (this.picture.width === width && this.picture.height === height)) return;
    this.picture = { width, height };
    Object.assign(this.element, this.picture);
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

  /** Return whether there was a picture. */
  async #showNext() {
    const newest = await this.fetchPicture();
    if (newest === null || this.destroyed) return false;
    this.waiting.push({ time: newest.time, bitmap: await createImageBitmap(newest.blob) });
    this.lagS = Math.max(newest.time - this.knownS, this.lagS - CATCH_UP_S);
    const until = Math.min(newest.time - this.lagS, this.knownS);
    const due = this.waiting.filter(({ time }) => time <= until).length;
    if (due > 0 || !this.pictured || this.waiting.length > MOST_WAITING) this.#draw(Math.max(due, 1));
    return true;
  }

  /** Draw the last of the pictures that are due. */
  #draw(due) {
    const pictures = this.waiting.splice(0, due);
    const { time, bitmap } = pictures[due - 1];
    this.pictured = true;
    this.shown = { time, exact: true };
    this.picture = { width: bitmap.width, height: bitmap.height };
    Object.assign(this.element, this.picture);
    this.element.getContext("2d").drawImage(bitmap, 0, 0);
    for (const picture of pictures) picture.bitmap.close();
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
