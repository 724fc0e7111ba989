// What the page is made of, what it looks at, and what is being done. The modules that act on these import them from here.

import { Answers } from "./answers.js";
import { Api } from "./api.js";
import { clock } from "./boxes.js";
import { byId, say } from "./elements.js";
import { askKey } from "./key.js";
import { Failure, Work } from "./progress.js";
import { Queries } from "./queries.js";
import { Viewer } from "./viewer.js";

/**
 * `current`: what is looked at, a file of this browser with its record on the server once it is there, or a live source.
 * `running`: what can be cancelled: sending, waiting, or a job.
 * `limits`: what the server takes at most, as far as it has said so.
 */
export const state = { current: null, running: null, sample: null, limits: {} };

export const api = new Api(askKey);
export const answers = new Answers(byId("answer-list"), {
  onSeek: (time) => viewer.seek(time),
  onHide: (index, hidden) => viewer.boxes.setHidden(index, hidden),
});
export const viewer = new Viewer(
  {
    ...Object.fromEntries(
      ["viewer", "frame", "overlay", "controls", "play", "back", "forward", "sound", "full", "time", "whole", "scrubber"]
        .map((name) => [name, byId(name)]),
    ),
    keyArea: document.querySelector(".show"),
  },
  answers,
);
export const queries = new Queries(byId("queries"), () => byId("ask").requestSubmit());
export const work = new Work({
  section: byId("work"), title: byId("work-title"), list: byId("stages"), status: byId("status"),
});
export const failure = new Failure({
  section: byId("failure"), title: byId("failure-title"), text: byId("failure-text"), again: byId("again"),
});

/** Let go of what is looked at, here and on the server. */
export function leave() {
  cancel();
  failure.clear();
  say(byId("note"), "");
  forgetAnswers();
  viewer.close();
  if (state.current?.stop) state.current.stop.abort();
  if (state.current?.record) api.forget(`v1/videos/${state.current.record.id}`);
  if (state.current?.url) URL.revokeObjectURL(state.current.url);
  state.current = null;
}

/** Take the answers off the page. */
export function forgetAnswers() {
  byId("answers").hidden = true;
  byId("events").hidden = true;
  byId("events").replaceChildren();
  answers.clear();
  viewer.setAnswers([]);
}

/** Give up what is being done, here and on the server. */
export function cancel() {
  if (!state.running) return;
  if (state.running.job) api.forget(`v1/jobs/${state.running.job}`);
  state.running.stop.abort();
}

/** Show that something is looked at. @param {string} text what is known of it. */
export function show(name, text) {
  showStage(true);
  byId("file-name").textContent = name;
  byId("start").textContent = state.current.live ? "Watch" : "Find";
  byId("options").hidden = Boolean(state.current.live);
  facts(text);
}

/** Show what is looked at, or the invitation to choose something. */
export function showStage(chosen) {
  byId("empty").hidden = chosen;
  byId("viewer").hidden = byId("file-card").hidden = !chosen;
  document.body.classList.toggle("nothing", !chosen);
}

/** Bring an element into view where it is not, on a phone for instance. */
export function reveal(element) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

/** Say what is known of the file. */
export function facts(text) {
  byId("file-facts").textContent = text;
}

/** Return what the server knows of a video, in words. */
export function describe({ width, height, duration_s: duration, frames }) {
  const known = [`${width} × ${height}`, duration > 0 && clock(duration), frames > 1 && `${frames} frames`];
  return known.filter(Boolean).join(", ");
}

/** Return a number of bytes as people read it. */
export function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${Number((bytes / 1e6).toFixed(1))} MB`;
}

/** Whether the same again may go better. */
export function canRepeat(error) {
  return !(error.status >= 400 && error.status < 500) || [401, 404, 408, 410, 429].includes(error.status);
}
