// The rows that queries are typed into.

import { icon, make } from "./elements.js";
import { colourOf } from "./palette.js";

const EXAMPLES = ["the red car moving left", "the man who sits down", "a dog"];

export class Queries {
  /** @param {HTMLOListElement} list  @param {() => void} onEnter called where Enter is pressed. */
  constructor(list, onEnter) {
    this.list = list;
    this.onEnter = onEnter;
    this.most = Infinity;
    this.mostCharacters = null;
    this.add();
  }

  /** Return what is typed, without empty rows. */
  get values() {
    return this.#inputs().map((input) => input.value.trim()).filter((query) => query !== "");
  }

  /** Add a row after `before`, or at the end, and return its input. */
  add(value = "", before = null) {
    const input = make("input", { type: "text", value, spellcheck: true, autocomplete: "off", enterKeyHint: "search" });
    const remove = make("button.icon", { type: "button" }, icon("close"));
    const row = make("li.query", {}, make("span.number", { "aria-hidden": "true" }), input, remove);
    if (before) before.after(row);
    else this.list.append(row);
    remove.addEventListener("click", () => this.#remove(row, true));
    input.addEventListener("keydown", (event) => this.#onKey(event, row, input));
    input.addEventListener("paste", (event) => this.#onPaste(event, row, input));
    this.#number();
    return input;
  }

  /** Take what the server takes at most: rows, and characters of one. */
  setLimits(most, characters) {
    this.most = most ?? Infinity;
    this.mostCharacters = characters ?? null;
    this.#number();
  }

  /** Whether there may be another row. */
  get hasRoom() {
    return this.list.children.length < this.most;
  }

  /** Type a query into the first empty row. */
  fill(query) {
    (this.#inputs().find((input) => input.value.trim() === "") ?? this.add()).value = query;
  }

  focus() {
    const inputs = this.#inputs();
    (inputs.find((input) => input.value.trim() === "") ?? inputs[inputs.length - 1]).focus();
  }

  #inputs() {
    return [...this.list.querySelectorAll("input")];
  }

  #onKey(event, row, input) {
    if (event.isComposing) return;
    if (event.key === "Enter") {
      event.preventDefault();
      if (!event.shiftKey) this.onEnter();
      else if (this.hasRoom) this.add("", row).focus();
    } else if (event.key === "Backspace" && input.value === "" && this.list.children.length > 1) {
      event.preventDefault();
      this.#remove(row, true);
    }
  }

  /** Several lines become several rows. */
  #onPaste(event, row, input) {
    const lines = (event.clipboardData?.getData("text") ?? "").split(/\r?\n/).map((line) => line.trim()).filter(Boolean);
    if (lines.length < 2) return;
    event.preventDefault();
    let last = input;
    if (input.value.trim() === "") input.value = lines.shift();
    let place = row;
    for (const line of lines) {
      if (!this.hasRoom) break;
      last = this.add(line, place);
      place = last.closest("li");
    }
    last.focus();
  }

  #remove(row, focus) {
    const neighbour = row.previousElementSibling ?? row.nextElementSibling;
    if (!neighbour) {
      row.querySelector("input").value = "";
    } else {
      row.remove();
      this.#number();
    }
    if (focus) (neighbour ?? row).querySelector("input").focus();
  }

  #number() {
    [...this.list.children].forEach((row, index) => {
      row.style.setProperty("--colour", colourOf(index));
      row.querySelector(".number").textContent = String(index + 1);
      const input = row.querySelector("input");
      input.setAttribute("aria-label", `Query ${index + 1}`);
      input.placeholder = EXAMPLES[index % EXAMPLES.length];
      if (this.mostCharacters) input.maxLength = this.mostCharacters;
      row.querySelector("button").setAttribute("aria-label", `Remove query ${index + 1}`);
    });
    this.list.dispatchEvent(new Event("rows"));
  }
}
