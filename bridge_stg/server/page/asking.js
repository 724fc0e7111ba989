// Sends queries about a video and shows the answers.

import { ServerError } from "./api.js";
import { byId } from "./elements.js";
import { answers, api, canRepeat, failure, forgetAnswers, reveal, state, viewer, work } from "./parts.js";
import { send } from "./sending.js";

/** Run something that can be cancelled, with the form in the state that belongs to it. */
export async function run(target, title, sending, task) {
  const stop = new AbortController();
  const mine = (state.running = { target, stop, job: null });
  setBusy(true);
  work.begin(title, sending);
  reveal(byId("work"));
  let summary = "";
  try {
    summary = await task(mine);
  } catch (error) {
    if (error.name === "AbortError") summary = "Cancelled.";
    else if (target === state.current) failure.show(error, canRepeat(error) ? () => byId("ask").requestSubmit() : null);
  } finally {
    if (state.running === mine) {
      state.running = null;
      work.end(summary);
      setBusy(false);
    }
  }
}

/** Send the queries about the video and show the answers. */
export function find(target, requested) {
  forgetAnswers();
  const title = requested.length === 1 ? "Looking for it" : `Looking for ${requested.length} things`;
  return run(target, title, !target.record, async (mine) => {
    const { signal } = mine.stop;
    const onWait = (seconds) => work.busy(seconds);
    if (!target.record) work.note("upload", target.part ?? 0, 1);
    const task = byId("only-when").checked ? "span" : "tube";
    const start = async () => {
      const { id } = target.record ?? (await unlessAborted(send(target), signal));
      const body = { video: id, queries: requested, task, allow_none: byId("allow-none").checked };
      return api.json("v1/jobs", { method: "POST", json: body, signal, onWait });
    };
    let job;
    try {
      job = await start();
    } catch (error) {
      if (error.status !== 404 || !target.record) throw error;
      Object.assign(target, { record: null, sending: null }); // it was kept for a while only: send it again
      job = await start();
    }
    mine.job = job.id;
    work.queued(job.position ?? 0);
    const done = await finished(job, mine, onWait);
    mine.job = null;
    showAnswers(done);
    return answers.summary;
  });
}

/** Follow a job to its end and return it. */
async function finished(job, { stop }, onWait) {
  const isLast = (event) => ["done", "failed", "cancelled"].includes(event);
  for await (const { event, data } of api.events(`v1/jobs/${job.id}/events`, { signal: stop.signal, isLast, onWait })) {
    if (event === "queued") work.queued(data.position ?? 0);
    if (event === "progress") work.note(data.stage, data.done, data.total);
    if (event === "done") return data.results ? data : api.json(`v1/jobs/${job.id}`, { signal: stop.signal });
    if (event === "failed") throw failed(data);
    if (event === "cancelled") throw new DOMException("cancelled", "AbortError");
  }
  throw new Error("The server ended before it had an answer.");
}

/** Return the error that an event tells of. */
export function failed({ error, code, status }) {
  return new ServerError(status ?? null, code, error ?? "The server gave no reason.");
}

function showAnswers(job) {
  const { durationS, frameS } = viewer.player;
  state.current.job = job;
  answers.show(job.results, { durationS, frameS });
  viewer.setAnswers(job.results);
  byId("answers-title").textContent = answers.summary.replace(/\.$/, "");
  byId("save-drawn").hidden = viewer.player.isVideo === false && !job.results.some((result) => result.boxes);
  byId("save-drawn").querySelector("span").textContent = durationS > 0 ? "Video with boxes" : "Image with boxes";
  byId("keys").hidden = !viewer.player.isVideo;
  byId("downloads").hidden = byId("answers").hidden = false;
  const first = answers.ends.find((occurrences) => occurrences.length > 0);
  if (first && durationS > 0) viewer.seek(first[0][0]);
  reveal(byId("viewer"));
}

function setBusy(busy) {
  byId("start").disabled = busy;
  byId("cancel").hidden = !busy;
  byId("cancel").textContent = busy && state.current?.live ? "Stop" : "Cancel";
  document.body.classList.toggle("busy", busy);
}

/** Wait for a promise that others wait for, too, and stop waiting when the signal says so. */
function unlessAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(new DOMException("cancelled", "AbortError")), { once: true });
    promise.then(resolve, reject);
  });
}
