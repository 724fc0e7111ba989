"""What is on the page, measured in its pixels."""

MEASURE = """([colour, size]) => {
  const overlay = document.getElementById("overlay");
  const shown = document.querySelector("#frame > :not(#overlay)");
  const natural = { width: shown.videoWidth ?? shown.naturalWidth ?? shown.width,
                    height: shown.videoHeight ?? shown.naturalHeight ?? shown.height };
  const find = (canvas, isIt, share) => {
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    const columns = new Array(width).fill(0), rows = new Array(height).fill(0);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      if (isIt(data, 4 * (y * width + x))) { columns[x]++; rows[y]++; }
    }
    const ends = (counts) => {
      const least = Math.max(1, share * Math.max(...counts));
      const marked = counts.map((count) => count >= least);
      return [marked.indexOf(true), marked.lastIndexOf(true) + 1, marked.indexOf(false, marked.indexOf(true)),
              marked.slice(0, marked.lastIndexOf(true)).lastIndexOf(false) + 1];
    };
    return Math.max(...columns) === 0 ? null : { x: ends(columns), y: ends(rows) };
  };
  const near = (data, i) => data[i + 3] > 200 && colour.every((value, c) => Math.abs(data[i + c] - value) < 40);
  const line = find(overlay, near, 0.55);
  const place = overlay.getBoundingClientRect(), under = shown.getBoundingClientRect();
  const scale = Math.min(under.width / natural.width, under.height / natural.height);
  const left = under.left + (under.width - natural.width * scale) / 2 - place.left;
  const top = under.top + (under.height - natural.height * scale) / 2 - place.top;
  const ratio = overlay.width / place.width;
  const x = (pixel) => (pixel / ratio - left) / (natural.width * scale) * size.width;
  const y = (pixel) => (pixel / ratio - top) / (natural.height * scale) * size.height;
  const still = document.createElement("canvas");
  still.width = size.width; still.height = size.height;
  still.getContext("2d").drawImage(shown, 0, 0, size.width, size.height);
  const target = find(still, (data, i) => data[i] > 128, 0.5);
  return {
    time: Number(document.getElementById("scrubber").getAttribute("aria-valuenow")),
    drawn: line && [x(line.x[2]), y(line.y[2]), x(line.x[3]), y(line.y[3])],
    target: target && [target.x[0], target.y[0], target.x[1], target.y[1]],
  };
}"""
"""JavaScript that takes [colour, size of the video] and returns {time, drawn, target}.

`drawn`: left, top, right, bottom of the inner edges of the coloured box on the overlay, `target` of what is brighter
than half in the image below it, in pixels of the video; null where there is none. How the image is fitted into its
element is computed here once more, not asked of the page.
"""
