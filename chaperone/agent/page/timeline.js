// The last hours as a picture: a row for each host or value of a label, a bar for each run.

const SVG = "http://www.w3.org/2000/svg";
const MOST_BARS = 2_000; // a picture of more is no picture
const MOST_ROWS = 24;
const LANES = 6; // bars side by side in a row; further ones are drawn over the last
const LANE = 9,
  HEAD = 18; // pixels
const TICK = 110; // pixels that a time takes
const RIGHT = 8; // pixels beside now, for the bar of what has just begun

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Draw runs on so many pixels; `rowOf` names the row of a status.
function timeline(statuses, hours, rowOf, now, room) {
  const left = Math.min(150, room / 4),
    width = room - left - RIGHT;
  const begin = now - hours * 3_600_000;
  const bars = [];
  for (const status of statuses) {
    const from = Date.parse(status.start_time ?? status.create_time);
    const to = status.end_time ? Date.parse(status.end_time) : now;
    if (to >= begin && from <= now) {
      bars.push({ status, from: Math.max(begin, from), to: Math.min(now, to) });
    }
  }
  bars.sort((one, other) => one.from - other.from);
  const drawn = bars.slice(-MOST_BARS);
  const rows = new Map();
  for (const bar of drawn) {
    const name = rowOf(bar.status);
    if (!rows.has(name) && rows.size === MOST_ROWS) continue;
    const lanes = rows.get(name) ?? rows.set(name, []).get(name);
    const free = lanes.findIndex((lane) => lane.at(-1).to < bar.from - hours * 2_000);
    if (free >= 0) lanes[free].push(bar);
    else if (lanes.length < LANES) lanes.push([bar]);
    else lanes.at(-1).push(bar);
  }
  const names = [...rows.keys()].sort();
  const height = HEAD + names.reduce((sum, name) => sum + rows.get(name).length * LANE + 10, 6);
  const failed = drawn.filter((bar) => hasFailed(bar.status)).length;
  const picture = shape("svg", {
    viewBox: `0 0 ${room} ${height}`,
    height,
    role: "img",
    "aria-label": `${bars.length} runs in ${names.length} rows, ${failed} of them failed`,
  });
  const x = (moment) => left + ((moment - begin) / (now - begin)) * width;
  const parts = Math.max(1, [6, 3, 2].find((count) => count * TICK <= width) ?? 1);
  for (let part = 0; part <= parts; part += 1) {
    const at = left + (part / parts) * width;
    picture.append(shape("line", { x1: at, x2: at, y1: HEAD, y2: height, class: "grid" }));
    const when = new Date(begin + (part / parts) * (now - begin));
    const label = when.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit" });
    picture.append(
      shape(
        "text",
        { x: at, y: 13, "text-anchor": part === parts ? "end" : part ? "middle" : "start" },
        label,
      ),
    );
  }
  let top = HEAD + 6;
  for (const name of names) {
    const shown = visible(name);
    picture.append(
      shape(
        "text",
        { x: 4, y: top + 9 },
        shown.length > left / 7 ? `${shown.slice(0, left / 7 - 1)}…` : shown,
      ),
    );
    for (const lane of rows.get(name)) {
      for (const bar of lane) {
        const rect = shape("rect", {
          x: x(bar.from),
          y: top,
          width: Math.max(2, x(bar.to) - x(bar.from)),
          height: LANE - 2,
          rx: 1,
          class: tone(bar.status),
        });
        rect.append(
          shape("title", {}, `${bar.status.run_id}: ${bar.status.state} ${outcome(bar.status)}`),
        );
        rect.dataset.run = bar.status.run_id;
        picture.append(rect);
      }
      top += LANE;
    }
    top += 10;
  }
  return picture;
}
