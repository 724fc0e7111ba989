// Opens a file: shows it here, sends it to the server, and gets its frames from there if the browser cannot play it.

import { ServerError } from "./api.js";
import { byId, say } from "./elements.js";
import {
  api, canRepeat, describe, facts, failure, leave, queries, show, showStage, size, state, viewer, work,
} from "./parts.js";
import { FramePlayer, ImagePlayer, VideoPlayer } from "./player.js";

const NOT_PLAYABLE =
  "This browser cannot play this file, so its frames come one by one from the server. Times and boxes are the same.";
const NOT_PLAYABLE_YET = "This browser cannot show this file; its frames will come from the server.";
const NOT_SHOWN = "Neither this browser nor the server can show the frames of this file.";

/** Look at a file: show it, and send it. */
export function openFile(file) {
  leave();
  if (file.size > state.limits.upload_bytes) {
    showStage(false);
    const text = `${file.name} has ${size(file.size)}; this server accepts ${size(state.limits.upload_bytes)}.`;
    return failure.show(new ServerError(413, "size", text));
  }
  const url = URL.createObjectURL(file);
  state.current = { file, url, name: file.name, record: null };
  show(file.name, `${size(file.size)}, being sent`);
  const mine = state.current;
  const player = file.type.startsWith("image/") ? new ImagePlayer(url) : new VideoPlayer(url);
  player.addEventListener("fail", () => mine === state.current && fallBack(mine));
  player.addEventListener("state", () => mine === state.current && checkShape(mine));
  viewer.setPlayer(player);
  queries.focus();
  send(mine).catch(() => {});
}

/** Send the file once; who calls again gets the same. */
export function send(target) {
  target.sending ??= (async () => {
    const stop = (target.stop = new AbortController());
    try {
      target.record = await api.upload(target.file, {
        signal: stop.signal,
        onProgress: (part) => {
          target.part = part;
          if (state.running?.target === target) work.note("upload", part, 1);
          else if (target === state.current) facts(`${size(target.file.size)}, ${Math.round(100 * part)} % sent`);
        },
        onWait: (seconds) => state.running?.target === target && work.busy(seconds),
      });
    } catch (error) {
      target.sending = null;
      if (target === state.current) notSent(target, error);
      throw error;
    }
    if (target !== state.current) return api.forget(`v1/videos/${target.record.id}`);
    const { record } = target;
    facts(describe(record));
    viewer.player.setRecord(record);
    if (target.unplayable) fallBack(target);
    else checkShape(target);
    return record;
  })();
  return target.sending;
}

/** Say why a file is not on the server; one that the server will never take is put away. */
function notSent(target, error) {
  const requested = state.running?.target === target;
  facts("not on the server");
  if (error.name === "AbortError") return;
  if (canRepeat(error)) {
    if (!requested) failure.show(error, () => send(target).catch(() => {}));
    return;
  }
  leave();
  showStage(false);
  failure.show(error);
}

/** Get the frames from the server, because this browser cannot show the file. */
function fallBack(target) {
  target.unplayable = true;
  if (!target.record) return say(byId("note"), NOT_PLAYABLE_YET);
  if (target.fellBack) return say(byId("note"), NOT_SHOWN);
  target.fellBack = true;
  say(byId("note"), NOT_PLAYABLE);
  const player = new FramePlayer(target.record, async (time) => {
    const response = await api.request(`v1/videos/${target.record.id}/frame?time=${time.toFixed(6)}`);
    return { time: Number.parseFloat(response.headers.get("X-Frame-Time") ?? time), blob: await response.blob() };
  });
  player.addEventListener("fail", () => target === state.current && fallBack(target));
  viewer.setPlayer(player);
}

/** A browser that rotates the image differently from the server would show boxes in wrong places. */
function checkShape(target) {
  const { image } = viewer.player;
  const { record } = target;
  if (!record || target.fellBack) return;
  if (viewer.player instanceof ImagePlayer && record.duration_s > 0) return fallBack(target); // an animated image
  if (!image.width || !record.width) return;
  const turned = (image.width > image.height) !== (record.width > record.height);
  if (turned && image.width === record.height && image.height === record.width) fallBack(target);
}
