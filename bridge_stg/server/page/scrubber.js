// The bar below the video: where it is, and going elsewhere by pointer or keyboard.

import { clock } from "./boxes.js";
import { make } from "./elements.js";

const STEPS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];
const TICK_PIXELS = 56;
/** Pixels within which a pointer means the end of a span. */
const CATCH_PIXELS = 7;

export class Scrubber {
  /** @param {HTMLElement} element with role slider.  @param {(time: number) => void} onSeek */
  constructor(element, onSeek) {
    this.element = element;
    this.onSeek = onSeek;
    this.durationS = 0;
    this.track = element.querySelector(".track");
    this.axis = element.querySelector(".axis");
    followPointer(element, this.track, () => this.durationS, () => [], onSeek);
    new ResizeObserver(() => this.#drawAxis()).observe(element);
  }

  setDuration(durationS) {
    if (durationS === this.durationS) return;
    this.durationS = durationS;
    this.element.setAttribute("aria-valuemax", durationS.toFixed(3));
    this.#drawAxis();
  }

  /** @param {string} text what is there, in words. */
  setTime(time, text) {
    this.element.style.setProperty("--at", part(time, this.durationS));
    this.element.setAttribute("aria-valuenow", time.toFixed(3));
    this.element.setAttribute("aria-valuetext", text);
  }

  #drawAxis() {
    const room = this.track.clientWidth;
    this.axis.replaceChildren();
    if (!(this.durationS > 0) || room === 0) return;
    const step = STEPS_S.find((candidate) => (candidate / this.durationS) * room >= TICK_PIXELS) ?? this.durationS;
    for (let i = 0; i * step <= this.durationS * (1 + 1e-9); i += 1) {
      const label = make("span", {}, axisText(i * step, step));
      label.style.setProperty("--at", part(i * step, this.durationS));
      this.axis.append(label);
    }
  }
}

/**
 * Let a pointer on a track seek, also by dragging.
 *
 * @param {() => number[]} ends times that catch a pointer that comes near.
 */
export function followPointer(area, track, duration, ends, onSeek) {
  const seek = (event) => {
    const { left, width } = track.getBoundingClientRect();
    const time = Math.min(Math.max((event.clientX - left) / width, 0), 1) * duration();
    const near = ends().find((end) => Math.abs(end - time) * (width / duration()) <= CATCH_PIXELS);
    if (duration() > 0) onSeek(near ?? time);
  };
  area.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    area.setPointerCapture(event.pointerId);
    seek(event);
  });
  area.addEventListener("pointermove", (event) => area.hasPointerCapture(event.pointerId) && seek(event));
}

/** Return a time as a share of the video, for CSS. */
export function part(time, durationS) {
  return durationS > 0 ? `${(100 * Math.min(Math.max(time / durationS, 0), 1)).toFixed(4)}%` : "0%";
}

function axisText(time, step) {
  if (time >= 60) return clock(time).replace(/\.00$/, "");
  return `${time.toFixed(step < 1 ? 1 : 0)} s`;
}
