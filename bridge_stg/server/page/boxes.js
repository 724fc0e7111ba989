// Where a query's box is at a time, and where a video's pixels are on the page. Knows nothing of the page's elements.

/** Seconds by which two clocks may differ and still mean the same frame. */
export const SAME_FRAME_S = 2e-3;

/**
 * Return the box of the frame that is shown, or null if that frame has none.
 *
 * @param {Array|null} boxes a grounding's `boxes`: one object a frame of the span, in order of time.
 * @param {number} time seconds from the video's first frame.
 * @param {boolean} exact true if `time` is the shown frame's own; false if that frame is the last one at or before it.
 */
export function boxAt(boxes, time, exact) {
  if (!boxes || boxes.length === 0) return null;
  const index = lastAtOrBefore(boxes, time + SAME_FRAME_S);
  const next = boxes[index + 1];
  if (index < 0) return exact && next.time_s - time <= SAME_FRAME_S ? next : null;
  const here = boxes[index];
  if (time - here.time_s <= SAME_FRAME_S) return here;
  if (!exact) return time < here.time_s + gapAfter(boxes, index) ? here : null;
  if (!next) return time - here.time_s < gapAfter(boxes, index) / 4 ? here : null;
  const part = (time - here.time_s) / (next.time_s - here.time_s);
  return {
    ...(part < 0.5 ? here : next),
    time_s: time,
    box: here.box.map((side, i) => side + part * (next.box[i] - side)),
    presence: here.presence + part * (next.presence - here.presence),
    interpolated: true,
  };
}

/** Return all occurrences of what was found, best first: those of a searched video, else the grounding itself. */
export function occurrencesOf(grounding) {
  if (!grounding.found) return [];
  return (grounding.occurrences ?? [grounding]).map((one) => ({ ...one, found: true }));
}

/** Return the box of the frame that is shown, of the best occurrence that has one, or null; see `boxAt`. */
export function boxOf(grounding, { time, exact }) {
  for (const { boxes } of occurrencesOf(grounding)) {
    const box = boxAt(boxes, time, exact);
    if (box) return box;
  }
  return null;
}

/** Return the index of the last box that is not later than `time`; -1 if all are. */
function lastAtOrBefore(boxes, time) {
  let low = 0;
  let high = boxes.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (boxes[middle].time_s <= time) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** Return for how long the frame at `index` is shown. */
function gapAfter(boxes, index) {
  if (index + 1 < boxes.length) return boxes[index + 1].time_s - boxes[index].time_s;
  return index > 0 ? boxes[index].time_s - boxes[index - 1].time_s : 0.04;
}

/**
 * Return left, top, width and height, in the area's pixels, of an image that is fitted into an area as a whole.
 *
 * @param {{width: number, height: number}} area
 * @param {{width: number, height: number}} image size as displayed, after rotation.
 */
export function fitted(area, image) {
  if (!(area.width > 0 && area.height > 0 && image.width > 0 && image.height > 0)) return null;
  const scale = Math.min(area.width / image.width, area.height / image.height);
  const [width, height] = [image.width * scale, image.height * scale];
  return { left: (area.width - width) / 2, top: (area.height - height) / 2, width, height };
}

/** Return a span's first and last moment that shows something of it, in seconds; null if nothing was found. */
export function endsOf(grounding, frameS) {
  if (!grounding.found || !grounding.span) return null;
  const { start_s: start, end_s: end } = grounding.span;
  if (grounding.boxes && grounding.boxes.length > 0) {
    return [grounding.boxes[0].time_s, grounding.boxes[grounding.boxes.length - 1].time_s];
  }
  return [start, Math.max(start, end - frameS)];
}

/**
 * Cut a found span into parts that the model is sure of and parts that it doubts.
 *
 * @returns {Array<{start: number, end: number, visible: boolean}>} seconds; together they are the span.
 */
export function partsOf(grounding) {
  if (!grounding.found || !grounding.span) return [];
  const { start_s: start, end_s: end } = grounding.span;
  const parts = [];
  for (const { time_s: time, visible } of grounding.boxes ?? []) {
    if (parts.length > 0 && parts[parts.length - 1].visible === visible) continue;
    if (parts.length > 0) parts[parts.length - 1].end = time;
    parts.push({ start: parts.length > 0 ? time : start, end, visible });
  }
  return parts.length > 0 ? parts : [{ start, end, visible: true }];
}

/**
 * Return the time of the frame before or after the shown one: a known one if it is near, else one frame's length away.
 *
 * @param {number[]} known times of frames, sorted.
 * @param {number} direction -1 or 1.
 */
export function neighbour(known, time, direction, frameS) {
  const there = known.filter((other) => direction * (other - time) > SAME_FRAME_S);
  const nearest = direction > 0 ? there[0] : there[there.length - 1];
  if (nearest !== undefined && Math.abs(nearest - time) < 1.6 * frameS) return nearest;
  return Math.max(0, Math.round((time + direction * frameS) / frameS) * frameS);
}

/** Return seconds as people read them: 3.25 s, from a minute on 1:03.25. */
export function clock(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.round(Math.max(0, seconds) * 100) / 100;
  if (whole < 60) return `${whole.toFixed(2)} s`;
  const minutes = Math.floor(whole / 60);
  const rest = (whole - 60 * minutes).toFixed(2).padStart(5, "0");
  if (minutes < 60) return `${minutes}:${rest}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}
