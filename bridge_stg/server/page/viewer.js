// The video with its boxes, its buttons, its keys and the bar below it.

import { clock, boxOf, neighbour, occurrencesOf } from "./boxes.js";
import { Overlay, paint } from "./overlay.js";
import { Scrubber } from "./scrubber.js";

export class Viewer {
  /**
   * @param {{viewer, frame, overlay, controls, play, back, forward, sound, full, time, whole, scrubber, keyArea}} elements
   * @param {Answers} answers
   */
  constructor(elements, answers) {
    Object.assign(this, elements);
    this.answers = answers;
    this.player = null;
    this.boxes = new Overlay(this.overlay);
    this.bar = new Scrubber(this.scrubber, (time) => this.seek(time));
    this.play.addEventListener("click", () => this.toggle());
    this.back.addEventListener("click", () => this.step(-1));
    this.forward.addEventListener("click", () => this.step(1));
    this.frame.addEventListener("click", () => this.toggle());
    this.sound.addEventListener("click", () => (this.player.silent = !this.player.silent));
    this.full.hidden = !document.fullscreenEnabled;
    this.full.addEventListener("click", () => {
      if (document.fullscreenElement) document.exitFullscreen();
      else this.viewer.requestFullscreen();
    });
    this.keyArea.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Put another player on the page. */
  setPlayer(player) {
    this.player?.destroy();
    this.player = player;
    this.frame.prepend(player.element);
    player.addEventListener("frame", () => this.#onFrame());
    player.addEventListener("state", () => this.#onState());
    this.#onFrame();
    this.#onState();
  }

  close() {
    this.player?.destroy();
    this.player = null;
    this.setAnswers([]);
  }

  setAnswers(groundings) {
    this.boxes.setAnswers(groundings);
    const times = groundings.flatMap(occurrencesOf).flatMap(({ boxes }) => (boxes ?? []).map((box) => box.time_s));
    this.frameTimes = [...new Set(times)].sort((a, b) => a - b);
    if (this.player) this.#onFrame();
  }

  /** Go to a time, in seconds from the first frame. */
  seek(time) {
    this.player?.seek(time);
  }

  toggle() {
    if (!this.player?.isVideo) return;
    if (this.player.playing) this.player.pause();
    else this.player.play();
  }

  /** Go to the frame before or after. @param {number} direction -1 or 1. */
  step(direction) {
    if (!this.player?.isVideo) return;
    this.player.pause();
    this.seek(neighbour(this.frameTimes ?? [], this.#now, direction, this.player.frameS));
  }

  /** Go to the previous or next end of a span. */
  toSeam(direction) {
    const seams = this.answers.seams.filter((seam) => direction * (seam - this.#now) > 5e-3);
    if (seams.length > 0) this.seek(direction > 0 ? seams[0] : seams[seams.length - 1]);
  }

  /** Return the image with its boxes as a PNG. */
  drawn() {
    const { width, height } = this.player.image;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    context.drawImage(this.player.element, 0, 0, width, height);
    paint(context, { left: 0, top: 0, width, height }, this.boxes.answers, this.player.shown, this.boxes.hidden);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  /** Where it is, or where it is going. */
  get #now() {
    return this.player.target ?? this.player.shown.time;
  }

  #onFrame() {
    const { image, shown, durationS } = this.player;
    if (image.width > 0) {
      this.frame.style.setProperty("--shape", `${image.width} / ${image.height}`);
      this.frame.style.setProperty("--upright", String(image.height > image.width ? 1 : 0));
    }
    this.boxes.show(shown, image);
    this.answers.setTime(shown.time, durationS);
    this.bar.setTime(shown.time, this.#inWords());
    this.time.textContent = clock(shown.time);
  }

  #inWords() {
    const { shown, durationS } = this.player;
    const there = this.boxes.answers.filter((answer) => boxOf(answer, shown));
    const names = there.length > 0 ? `, in view: ${there.map((answer) => answer.query).join("; ")}` : "";
    return `${clock(shown.time)} of ${clock(durationS)}${names}`;
  }

  #onState() {
    const { player } = this;
    this.controls.hidden = this.scrubber.hidden = !player.isVideo;
    this.play.setAttribute("aria-label", player.playing ? "Pause" : "Play");
    this.play.querySelector("use").setAttribute("href", player.playing ? "#i-pause" : "#i-play");
    this.sound.hidden = player.silent === undefined;
    this.sound.setAttribute("aria-pressed", String(Boolean(player.silent)));
    this.sound.querySelector("use").setAttribute("href", player.silent ? "#i-silent" : "#i-sound");
    this.bar.setDuration(player.durationS);
    this.answers.setTime(player.shown.time, player.durationS);
    this.time.textContent = clock(player.shown.time);
    this.whole.textContent = player.durationS > 0 ? ` / ${clock(player.durationS)}` : "";
  }

  #onKey(event) {
    if (!this.player?.isVideo || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, select, summary")) return;
    const onButton = event.target.closest("button, a");
    const actions = {
      " ": onButton ? null : () => this.toggle(),
      ArrowLeft: () => (event.shiftKey ? this.#leap(-1) : this.step(-1)),
      ArrowRight: () => (event.shiftKey ? this.#leap(1) : this.step(1)),
      PageDown: () => this.#leap(-1),
      PageUp: () => this.#leap(1),
      Home: () => this.seek(0),
      End: () => this.seek(this.player.durationS),
      "[": () => this.toSeam(-1),
      "]": () => this.toSeam(1),
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  #leap(seconds) {
    this.seek(this.#now + seconds);
  }
}
