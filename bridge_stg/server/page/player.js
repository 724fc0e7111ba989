// What shows a file: the browser's own video player, frames fetched from the server one by one where the browser cannot
// play the file, or an image. All have one interface and dispatch an event when another frame is on the page.

import { clock } from "./boxes.js";

const USUAL_FRAME_S = 0.04;
const CACHED_FRAMES = 240;
/** Added to a frame's time in its request, so that rounding never gives the one before. */
const HALF_A_MILLISECOND_S = 5e-4;

/**
 * Events: `frame` (another frame is shown), `state` (playing or paused, duration known), `fail` (cannot be shown).
 *
 * @property {{time: number, exact: boolean}} shown seconds from the first frame; see `boxAt`.
 * @property {{width: number, height: number}} image its size as displayed; 0 until it is known.
 */
class Player extends EventTarget {
  constructor(element) {
    super();
    this.element = element;
    this.shown = { time: 0, exact: true };
    this.record = null;
  }

  get durationS() {
    return this.record?.duration_s ?? 0;
  }

  /** How long a frame is shown, usually. */
  get frameS() {
    const { duration_s: duration, frames } = this.record ?? {};
    return duration > 0 && frames > 0 ? duration / frames : USUAL_FRAME_S;
  }

  /** Take what the server knows of the video: `duration_s`, `width`, `height`, `frames`. */
  setRecord(record) {
    this.record = record;
    this.tell("state");
  }

  tell(name) {
    this.dispatchEvent(new Event(name));
  }

  play() {}
  pause() {}
  seek() {}
  destroy() {
    this.element.remove();
  }
}

/** The browser's own player. */
export class VideoPlayer extends Player {
  /** @param {string} url of the video, or of a blob that holds it. */
  constructor(url) {
    const video = document.createElement("video");
    super(video);
    this.isVideo = true;
    this.origin = 0;
    this.target = null;
    this.begun = false;
    Object.assign(video, { playsInline: true, preload: "auto", disableRemotePlayback: true, src: url });
    video.setAttribute("aria-label", "The video");
    const state = () => this.tell("state");
    for (const name of ["play", "pause", "ended", "durationchange", "volumechange"]) video.addEventListener(name, state);
    video.addEventListener("loadeddata", () => (video.videoWidth > 0 ? state() : this.tell("fail")));
    video.addEventListener("error", () => this.tell("fail"));
    video.addEventListener("seeked", () => { this.target = null; this.#note(); });
    if ("requestVideoFrameCallback" in video) this.#followFrames();
    else this.#followClock();
  }

  get image() {
    return { width: this.element.videoWidth, height: this.element.videoHeight };
  }

  get durationS() {
    const own = this.element.duration;
    return this.record?.duration_s || (Number.isFinite(own) ? own : 0);
  }

  get playing() {
    return !this.element.paused && !this.element.ended;
  }

  get silent() {
    return this.element.muted;
  }

  set silent(silent) {
    this.element.muted = silent;
  }

  play() {
    this.element.play().catch(() => this.tell("state"));
  }

  pause() {
    this.element.pause();
  }

  /** Show the frame at `time`, counted from the first frame. */
  seek(time) {
    const inside = Math.min(Math.max(time, 0), Math.max(0, this.durationS - this.frameS / 2));
    this.target = inside;
    // A little after the frame's own time, which a browser may round down into the frame before.
    this.element.currentTime = this.origin + inside + Math.min(1e-3, this.frameS / 10);
    this.tell("state");
  }

  destroy() {
    this.destroyed = true;
    this.element.removeAttribute("src");
    this.element.load();
    super.destroy();
  }

  #followFrames() {
    const follow = (now, { mediaTime }) => {
      if (this.destroyed) return;
      if (!this.begun && this.element.currentTime < 1e-3) this.origin = mediaTime;
      this.begun = true;
      this.shown = { time: Math.max(0, mediaTime - this.origin), exact: true };
      this.tell("frame");
      this.element.requestVideoFrameCallback(follow);
    };
    this.element.requestVideoFrameCallback(follow);
  }

  #followClock() {
    const follow = () => {
      if (this.destroyed) return;
      if (this.playing) this.#note();
      requestAnimationFrame(follow);
    };
    requestAnimationFrame(follow);
    this.element.addEventListener("loadeddata", () => this.#note());
  }

  /** Without word of single frames, the clock tells which is shown. */
  #note() {
    if (!("requestVideoFrameCallback" in this.element)) this.shown = { time: this.element.currentTime, exact: false };
    this.tell("frame");
  }
}

/** Frames from the server, one by one, for files that the browser cannot play. Shows the newest that arrives in time. */
export class FramePlayer extends Player {
  /** @param {(time: number) => Promise<{time: number, blob: Blob}>} fetchFrame gets the frame shown at a time. */
  constructor(record, fetchFrame) {
    super(document.createElement("canvas"));
    this.element.setAttribute("role", "img");
    this.element.setAttribute("aria-label", "A frame of the video");
    this.fetchFrame = fetchFrame;
    this.cache = new Map();
    this.playing = false;
    this.position = 0;
    this.target = null;
    this.image = { width: record.width, height: record.height };
    this.setRecord(record);
    this.seek(0);
  }

  get isVideo() {
    return this.durationS > 0;
  }

  play() {
    if (this.playing || !this.isVideo) return;
    if (this.position >= this.durationS - 1.5 * this.frameS) this.position = 0;
    this.playing = true;
    this.began = performance.now() - 1000 * this.position;
    this.tell("state");
    this.#keepUp();
  }

  pause() {
    this.playing = false;
    this.tell("state");
  }

  seek(time) {
    this.position = Math.min(Math.max(time, 0), Math.max(0, this.durationS - this.frameS / 2));
    this.target = this.position;
    this.began = performance.now() - 1000 * this.position;
    this.tell("state");
    this.#keepUp();
  }

  destroy() {
    this.destroyed = true;
    super.destroy();
  }

  /** Show one frame after the other: where the clock is while playing, else where it was put. */
  async #keepUp() {
    if (this.busy) return;
    this.busy = true;
    try {
      while (!this.destroyed && (this.playing || this.target !== null)) {
        if (this.playing) this.position = (performance.now() - this.began) / 1000;
        if (this.position >= this.durationS && this.isVideo) this.#end();
        const requested = this.position;
        await this.#show(this.playing ? Math.floor(requested / this.frameS + 1e-3) * this.frameS : requested);
        if (requested === this.position) this.target = null;
        if (this.playing) await new Promise(requestAnimationFrame);
      }
    } catch (error) {
      this.playing = false;
      this.target = null;
      this.error = error;
      if (!this.destroyed) this.tell("fail");
    } finally {
      this.busy = false;
    }
  }

  #end() {
    this.playing = false;
    this.position = Math.max(0, this.durationS - this.frameS / 2);
    this.tell("state");
  }

  async #show(time) {
    const place = time.toFixed(3);
    if (place === this.place) return;
    let frame = this.cache.get(place);
    if (!frame) {
      frame = await this.fetchFrame(time + HALF_A_MILLISECOND_S);
      if (this.cache.size >= CACHED_FRAMES) this.cache.delete(this.cache.keys().next().value);
      this.cache.set(place, frame);
    }
    const bitmap = await createImageBitmap(frame.blob);
    if (this.destroyed) return;
    if (this.element.width !== bitmap.width || this.element.height !== bitmap.height) {
      this.element.width = bitmap.width;
      this.element.height = bitmap.height;
    }
    this.element.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    this.place = place;
    this.shown = { time: frame.time, exact: true };
    this.element.setAttribute("aria-label", `The frame at ${clock(frame.time)}`);
    this.tell("frame");
  }
}

/** An image. */
export class ImagePlayer extends Player {
  constructor(url) {
    const image = document.createElement("img");
    super(image);
    this.isVideo = false;
    this.playing = false;
    image.alt = "The image";
    image.addEventListener("load", () => { this.tell("frame"); this.tell("state"); });
    image.addEventListener("error", () => this.tell("fail"));
    image.src = url;
  }

  get image() {
    return { width: this.element.naturalWidth, height: this.element.naturalHeight };
  }
}
