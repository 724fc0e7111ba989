// The page: what its buttons and keys do. The other modules each do one of these things.

import { find } from "./asking.js";
import { byId, save, say } from "./elements.js";
import { api, cancel, failure, leave, queries, showStage, size, state, viewer } from "./parts.js";
import { openFile } from "./sending.js";
import { listSources, watch } from "./watching.js";

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const requested = queries.values;
  if (state.running) return;
  if (!state.current) say(byId("form-problem"), "Choose a video or an image first.");
  else if (requested.length === 0) say(byId("form-problem"), "Type what to look for.");
  else say(byId("form-problem"), "");
  if (!state.current) return byId("choose").focus();
  if (requested.length === 0) return queries.focus();
  failure.clear();
  if (state.current.live) watch(state.current, requested);
  else find(state.current, requested);
});

function choose() {
  byId("file").click();
}

byId("choose").addEventListener("click", choose);
byId("another").addEventListener("click", () => {
  if (byId("sources").hidden) return choose();
  leave();
  showStage(false);
  byId("choose").focus();
});
byId("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) openFile(target.files[0]);
  target.value = "";
});
byId("add").addEventListener("click", () => queries.add().focus());
byId("queries").addEventListener("rows", () => (byId("add").hidden = !queries.hasRoom));
byId("cancel").addEventListener("click", () => {
  cancel();
  byId("start").focus();
});
byId("save-json").addEventListener("click", () => {
  const text = JSON.stringify({ video: state.current.name, results: state.current.job.results }, null, 2);
  save(new Blob([text], { type: "application/json" }), `${stem(state.current.name)}.json`);
});
byId("save-drawn").addEventListener("click", async ({ currentTarget: button }) => {
  const { job, name } = state.current;
  button.disabled = true;
  byId("status").textContent = "Drawing the boxes";
  try {
    if (viewer.player.durationS > 0) {
      const drawn = await api.request(`v1/jobs/${job.id}/annotated.mp4`);
      save(await drawn.blob(), `${stem(name)}-boxes.mp4`);
    } else {
      save(await viewer.drawn(), `${stem(name)}-boxes.png`);
    }
    byId("status").textContent = "Saved";
  } catch (error) {
    failure.show(error);
  } finally {
    button.disabled = false;
  }
});

byId("sample").addEventListener("click", async ({ currentTarget: button }) => {
  const { name, query } = state.sample;
  button.disabled = true;
  try {
    const clip = await (await api.request("v1/sample")).blob();
    openFile(new File([clip], name, { type: clip.type }));
    if (query && queries.values.length === 0) queries.fill(query);
  } catch (error) {
    failure.show(error);
  } finally {
    button.disabled = false;
  }
});

function stem(name) {
  return name.replace(/\.[^.]*$/, "");
}

let dragged = 0;
const withFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => withFiles(event) && (byId("dropping").hidden = ++dragged < 1));
addEventListener("dragleave", (event) => withFiles(event) && (byId("dropping").hidden = --dragged < 1));
addEventListener("dragover", (event) => withFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!withFiles(event)) return;
  event.preventDefault();
  dragged = 0;
  byId("dropping").hidden = true;
  if (event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
});
addEventListener("pagehide", (event) => {
  cancel();
  if (!event.persisted && state.current?.record) api.forget(`v1/videos/${state.current.record.id}`);
});

/** Say which server this is and what it takes. */
async function greet() {
  try {
    const { bundle, backend, trained, knows, sample, limits = {} } = await api.json("health", { quiet: true });
    state.limits = limits;
    queries.setLimits(limits.queries, limits.query_chars);
    say(byId("untrained"), trained === false ? "This model is untrained: its answers mean nothing." : "");
    say(byId("knows"), knows);
    state.sample = sample;
    byId("sample").hidden = !sample;
    const minutes = limits.duration_s && `${Math.round(limits.duration_s / 6) / 10} minutes`;
    const bounds = [limits.upload_bytes && size(limits.upload_bytes), minutes].filter(Boolean);
    byId("limits").textContent = bounds.length > 0 ? ` Up to ${bounds.join(" and ")}.` : "";
    const name = typeof bundle === "string" ? bundle : (bundle?.name ?? "");
    say(byId("server"), [name, typeof backend === "string" ? backend : ""].filter(Boolean).join(" · "));
  } catch (error) {
    say(byId("server"), error.status === 0 ? "The server is not there" : "");
  }
}

byId("unlock").addEventListener("click", () => listSources(false));
api.onKey = () => {
  greet();
  listSources(true);
};
greet();
listSources(true);
