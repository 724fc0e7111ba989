// Looking at a file: showing it here, sending it to the server, and getting pictures from there where this browser cannot.

import { ServerError } from "./api.js";
import { byId, say } from "./elements.js";
import {
  api, canRepeat, describe, facts, failure, leave, queries, show, showStage, size, state, viewer, work,
} from "./parts.js";
import { FramePlayer, PicturePlayer, VideoPlayer } from "./player.js";

const NOT_PLAYABLE =
  "This browser cannot play this file, so its pictures come one by one from the server. Times and boxes are the same.";
const NOT_PLAYABLE_YET = "This browser cannot show this file; its pictures will come from the server.";
const NOT_SHOWN = "This file's pictures can be shown neither by this browser nor by the server.";

/** Look at a file: show it, and send it. */
export function openFile(file) {
  leave();
  if (file.size > state.limits.upload_bytes) {
    showStage(false);
    const text = `${file.name} has ${size(file.size)}; this server takes ${size(state.limits.upload_bytes)}.`;
    return failure.show(new ServerError(413, "size", text));
  }
  const url = URL.createObjectURL(file);
  state.current = { file, url, name: file.name, record: null };
  show(file.name, `${size(file.size)}, being sent`);
  const mine = state.current;
  const player = file.type.startsWith("image/") ? new PicturePlayer(url) : new VideoPlayer(url);
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
  const asked = state.running?.target === target;
  facts("not on the server");
  if (error.name === "AbortError") return;
  if (canRepeat(error)) {
    if (!asked) failure.show(error, () => send(target).catch(() => {}));
    return;
  }
  leave();
  showStage(false);
  failure.show(error);
}

/** Get the pictures from the server, since this browser cannot show the file. */
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

/** A browser that turns the picture otherwise than the server would put boxes in wrong places. */
function checkShape(target) {
  const { picture } = viewer.player;
  const { record } = target;
  if (!record || target.fellBack) return;
  if (viewer.player instanceof PicturePlayer && record.duration_s > 0) return fallBack(target); // a picture that moves
  if (!picture.width || !record.width) return;
  const turned = (picture.width > picture.height) !== (record.width > record.height);
  if (turned && picture.width === record.height && picture.height === record.width) fallBack(target);
}
