// What is being done, stage by stage.

import { make, say } from "./elements.js";

/** The stages in their order: which of the server's names belong to each, and what they are called here. */
const STAGES = [
  { names: ["upload"], text: "Sending the file" },
  { names: ["queued"], text: "Waiting for its turn" },
  { names: ["decode_video", "start"], text: "Reading the video" },
  { names: ["vision_coarse", "prefill"], text: "Looking at it" },
  { names: ["answer"], text: "Finding when" },
  { names: ["decode_fine", "vision_fine"], text: "Looking closer" },
  { names: ["spatial"], text: "Finding where" },
];

export class Work {
  /** @param {{section, title, list, status}} elements `status` is read out by screen readers. */
  constructor(elements) {
    Object.assign(this, elements);
    this.rows = STAGES.map(({ text }) => {
      const value = make("span.stage-value");
      const row = make("li", {}, make("span.stage-name", {}, text), value, make("span.bar", { "aria-hidden": "true" }));
      return { row, value };
    });
    this.list.append(...this.rows.map(({ row }) => row));
  }

  /** @param {string} title what is done, in a few words.  @param {boolean} sending whether a file is sent first. */
  begin(title, sending) {
    this.section.hidden = false;
    this.title.textContent = title;
    this.at = -1;
    this.rows.forEach(({ row }, index) => {
      row.hidden = index < 2 && !(index === 0 && sending);
      row.dataset.state = "waiting";
      row.removeAttribute("aria-current");
    });
  }

  /** Tell how far a stage is; `total` is null where it is not known. */
  note(name, done, total) {
    const index = STAGES.findIndex(({ names }) => names.includes(name));
    if (index < 0) return;
    if (index !== this.at) this.#enter(index);
    const { row, value } = this.rows[index];
    const share = total > 0 ? Math.min(done / total, 1) : null;
    row.classList.toggle("unknown", share === null);
    row.style.setProperty("--done", share === null ? "100%" : `${100 * share}%`);
    value.textContent = share === null ? "" : `${Math.round(100 * share)} %`;
  }

  /** @param {number} position how many are served first. */
  queued(position) {
    this.note("queued", 0, null);
    this.rows[1].value.textContent = position > 0 ? `${position} before you` : "";
  }

  /** @param {number} seconds until the next try; 0: it is tried now. */
  busy(seconds) {
    if (seconds > 0) {
      if (this.at !== 1) this.queued(0);
      this.rows[1].value.textContent = `busy, again in ${seconds} s`;
    } else {
      this.rows[1].value.textContent = "";
    }
  }

  /** @param {string} summary said at the end; empty: nothing is said. */
  end(summary) {
    this.section.hidden = true;
    this.at = -1;
    this.status.textContent = summary;
  }

  #enter(index) {
    this.at = index;
    this.rows.forEach(({ row, value }, other) => {
      row.dataset.state = other < index ? "done" : other === index ? "active" : "waiting";
      if (other === index) {
        row.hidden = false;
        row.setAttribute("aria-current", "step");
      } else {
        row.removeAttribute("aria-current");
        value.textContent = "";
      }
    });
    this.status.textContent = STAGES[index].text;
  }
}

const TITLES = {
  0: "The server cannot be reached",
  401: "The server needs an API key",
  404: "The server no longer has it",
  408: "It took too long",
  410: "The server no longer has it",
  413: "That is more than this server accepts",
  415: "This file cannot be read",
  422: "The request is not valid",
  429: "The server is busy",
  503: "The server is busy",
};

/** A place where an error is shown in plain words, with a way to go on. */
export class Failure {
  /** @param {{section, title, text, again}} elements */
  constructor(elements) {
    Object.assign(this, elements);
    this.again.addEventListener("click", () => {
      const retry = this.retry;
      this.clear();
      retry?.();
    });
  }

  /** @param {Error} error  @param {(() => void)|null} retry what trying again means; null: it makes no sense. */
  show(error, retry = null) {
    this.retry = retry;
    this.title.textContent = TITLES[error.status] ?? "That did not work";
    say(this.text, error.message);
    this.again.hidden = retry === null;
    this.section.hidden = false;
    this.section.scrollIntoView({ block: "nearest" });
  }

  clear() {
    this.section.hidden = true;
    this.text.textContent = "";
  }
}
