// Watching the server's live sources.

import { failed, run } from "./asking.js";
import { clock } from "./boxes.js";
import { byId, make } from "./elements.js";
import { LivePlayer, noteEvents, present } from "./live.js";
import { answers, api, forgetAnswers, leave, queries, show, state, viewer } from "./parts.js";

/** Look at a live source; it is watched once there are queries. */
export function openLive(name) {
  leave();
  state.current = { live: name, name };
  show(name, "live");
  viewer.setPlayer(new LivePlayer(async () => {
    try {
      const response = await api.request(`v1/live/${encodeURIComponent(name)}/frame`, { quiet: true });
      return { time: Number.parseFloat(response.headers.get("X-Frame-Time")), blob: await response.blob() };
    } catch {
      return null;
    }
  }));
  queries.focus();
}

/** Follow what the server tells of the queries on a live source until it is cancelled. */
export function watch(target, requested) {
  forgetAnswers();
  const list = byId("events");
  return run(target, `Watching ${target.name}`, false, async (mine) => {
    const { signal } = mine.stop;
    const parameters = new URLSearchParams(requested.map((query) => ["query", query]));
    const path = `v1/live/${encodeURIComponent(target.name)}/events?${parameters}`;
    byId("stages").hidden = true;
    try {
      for await (const { event, data } of api.events(path, { signal, isLast: (name) => ["end", "failed"].includes(name) })) {
        if (event === "failed") throw failed(data);
        if (event !== "update") continue;
        const now = present(data);
        if (now[0]) viewer.player.setSize(now[0].size);
        viewer.player.know(data.known_s);
        viewer.player.follow();
        answers.show(now, viewer.player, true);
        viewer.setAnswers(viewer.player.hasFrame ? data.groundings : now);
        noteEvents(list, data, requested);
        byId("answers-title").textContent = `${target.name} at ${clock(data.known_s)}`;
        byId("downloads").hidden = byId("keys").hidden = true;
        list.hidden = byId("answers").hidden = false;
      }
    } finally {
      byId("stages").hidden = false;
    }
    return "";
  });
}

/**
 * Offer the server's live sources.
 *
 * @param {boolean} quiet whether a key that the server wants is requested by a button instead of at once.
 */
export async function listSources(quiet) {
  byId("unlock").hidden = true;
  let sources = [];
  try {
    sources = (await api.json("v1/live", { quiet })).live ?? [];
  } catch (error) {
    byId("unlock").hidden = error.status !== 401;
  }
  byId("source-list").replaceChildren(...sources.map(({ name }) => {
    const button = make("button.button.small", { type: "button" }, name);
    button.addEventListener("click", () => openLive(name));
    return make("li", {}, button);
  }));
  byId("sources").hidden = sources.length === 0;
}
