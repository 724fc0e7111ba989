// One colour a query, in the order of the queries; annotated videos use the same.

export const COLOURS = [
  [255, 45, 190],
  [25, 200, 255],
  [255, 198, 26],
  [61, 220, 107],
  [255, 122, 31],
  [169, 139, 255],
  [47, 224, 200],
  [255, 90, 90],
];
export const INK = "rgb(28, 30, 34)";

/** Return the CSS colour of the query at `index`; after the last colour they begin again. */
export function colourOf(index) {
  return `rgb(${COLOURS[index % COLOURS.length].join(", ")})`;
}
