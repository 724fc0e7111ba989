// Boxes over a video that is playing, in the look of annotated videos: a coloured line around the box between dark ones,
// dashed where the model doubts it, thinner where the box was interpolated.

import { boxOf, fitted } from "./boxes.js";
import { colourOf, INK } from "./palette.js";

export class Overlay {
  /** @param {HTMLCanvasElement} canvas lies exactly over the element that shows the frame. */
  constructor(canvas) {
    this.canvas = canvas;
    this.answers = [];
    this.hidden = new Set();
    this.image = { width: 0, height: 0 };
    this.shown = { time: 0, exact: true };
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** @param {Array} answers groundings as the server gives them, in the order of the queries. */
  setAnswers(answers) {
    this.answers = answers;
    this.hidden.clear();
    this.draw();
  }

  /** Show or hide the box of one query. */
  setHidden(index, hidden) {
    if (hidden) this.hidden.add(index);
    else this.hidden.delete(index);
    this.draw();
  }

  /**
   * Draw the boxes of the frame that is on the page now.
   *
   * @param {{time: number, exact: boolean}} shown see `boxOf`.
   * @param {{width: number, height: number}} image its size in pixels, which gives the shape.
   */
  show(shown, image) {
    this.shown = shown;
    this.image = image;
    this.draw();
  }

  draw() {
    const area = { width: this.canvas.clientWidth, height: this.canvas.clientHeight };
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(area.width * ratio), Math.round(area.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, area.width, area.height);
    const place = fitted(area, this.image);
    if (place) paint(context, place, this.answers, this.shown, this.hidden);
  }
}

/**
 * Paint the boxes of one moment.
 *
 * @param {{left: number, top: number, width: number, height: number}} place where the image lies.
 */
export function paint(context, place, answers, shown, hidden = new Set()) {
  answers.forEach((answer, index) => {
    const found = hidden.has(index) ? null : boxOf(answer, shown);
    if (found) paintBox(context, place, answer.size, found, index);
  });
}

function paintBox(context, place, size, { box, visible, interpolated }, index) {
  const line = Math.max(2.5, Math.min(place.width, place.height) / 110) * (interpolated ? 0.75 : 1);
  const [scaleX, scaleY] = [place.width / size.width, place.height / size.height];
  const inside = (value, limit) => Math.min(Math.max(value, 0), limit);
  const left = place.left + inside(box[0] * scaleX, place.width) - line / 2;
  const top = place.top + inside(box[1] * scaleY, place.height) - line / 2;
  const right = place.left + inside(box[2] * scaleX, place.width) + line / 2;
  const bottom = place.top + inside(box[3] * scaleY, place.height) + line / 2;
  context.save();
  context.lineJoin = "miter";
  context.setLineDash(visible ? [] : [4 * line, 3 * line]);
  for (const [colour, width] of [[INK, line + 2], [colourOf(index), line]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(left, top, right - left, bottom - top);
  }
  context.restore();
  paintNumber(context, place, left - line / 2, top - line / 2, String(index + 1), colourOf(index));
}

/** Paint the query's number on a tab above the box's left corner, or inside where there is no room above. */
function paintNumber(context, place, left, top, text, colour) {
  const height = 17;
  context.font = `700 12px system-ui, sans-serif`;
  const width = Math.max(height, context.measureText(text).width + 9);
  const y = top - height >= place.top ? top - height : top;
  context.fillStyle = INK;
  context.fillRect(left - 1, y - 1, width + 2, height + 1);
  context.fillStyle = colour;
  context.fillRect(left, y, width, height);
  context.fillStyle = INK;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(text, left + width / 2, y + height / 2 + 0.5);
}
