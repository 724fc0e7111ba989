// The dialog for the server's API key.

import { byId } from "./elements.js";

/** Return the key that was typed; null if none was. @param {boolean} wrong whether the server rejected the previous one. */
export function askKey(wrong) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  byId("key-title").textContent = wrong ? "The server did not accept this key" : "This server needs an API key";
  input.value = "";
  dialog.returnValue = "";
  return new Promise((resolve) => {
    const submit = (event) => {
      event.preventDefault();
      if (input.value.trim() !== "") dialog.close(input.value.trim());
    };
    const giveUp = () => dialog.close("");
    byId("key-form").addEventListener("submit", submit);
    byId("key-cancel").addEventListener("click", giveUp);
    dialog.addEventListener("close", () => {
      byId("key-form").removeEventListener("submit", submit);
      byId("key-cancel").removeEventListener("click", giveUp);
      input.value = "";
      resolve(dialog.returnValue || null);
    }, { once: true });
    dialog.showModal();
    input.focus();
  });
}
