// Watching a live source: its newest picture, where the targets of the queries are now, and what happened.

import { sleep } from "./api.js";
import { clock } from "./boxes.js";
import { make } from "./elements.js";
import { colourOf } from "./palette.js";

const PICTURE_MS = 200;
const MOST_EVENTS = 200;
/** By how much a span may end before what is known and still be of now: about a group of coarse frames. */
const SETTLE_S = 0.75;

/** Shows a live source's newest picture, as often as the server gives one. Has the interface of the other players. */
export class LivePlayer extends EventTarget {
  /** @param {() => Promise<Blob|null>} fetchPicture null: this server gives none. */
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
  }

  /** Get pictures from now on, if that is not done already; the server has them while the source is watched. */
  async follow() {
    if (this.following) return;
    this.following = true;
    while (!this.destroyed && (await this.#showNewest())) await sleep(PICTURE_MS);
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
  async #showNewest() {
    const blob = await this.fetchPicture();
    if (blob === null || this.destroyed) return false;
    const bitmap = await createImageBitmap(blob);
    this.pictured = true;
    this.picture = { width: bitmap.width, height: bitmap.height };
    Object.assign(this.element, this.picture);
    this.element.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    this.dispatchEvent(new Event("frame"));
    return true;
  }
}

/** Return groundings of one moment, as the overlay draws them: the newest box of each target that is there now. */
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
