// Making elements of the page, and finding those that are there.

/** Return the element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element.
 *
 * @param {string} tag name and classes: "button.icon.small".
 * @param {object} properties set on the element; those that it does not know become attributes.
 */
export function make(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length > 0) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** Make one of the icons that index.html holds. */
export function icon(name) {
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  drawn.setAttribute("aria-hidden", "true");
  drawn.append(use);
  return drawn;
}

/** Let the person save a blob as a file. */
export function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Show a text in an element, or hide the element where there is none. */
export function say(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}
