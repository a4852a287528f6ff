// Curves as inline SVG: points in, an element out. It knows nothing of runs, and writes text as text alone.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const CLASSES = ["a", "b", "c"];

function svgElement(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// About `count` round values that span lowest to highest.
function ticks(lowest, highest, count) {
  const rough = (highest - lowest) / count || Math.abs(highest) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => rough <= power * factor * 1.0000001);
  const found = [];
  for (let place = Math.ceil(lowest / step - 1e-9); place * step <= highest + step * 1e-9; place += 1) {
    found.push(Number((place * step).toPrecision(12)));
  }
  return found;
}

// A figure with one or more curves. Each is {name, points: [[x, y], ...]}, ordered by x; returns null without points.
function curveFigure(title, curves, figureText) {
  const known = curves.filter((curve) => curve.points.length);
  if (!known.length) return null;
  const all = known.flatMap((curve) => curve.points);
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [x, y] of all) {
    x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, y); y1 = Math.max(y1, y);
  }
  if (x1 === x0) x1 = x0 + 1;
  const pad = (y1 - y0) * 0.08 || Math.abs(y1) * 0.1 || 1;
  const below = y0 >= 0 ? Math.max(0, y0 - pad) : y0 - pad;
  const above = y1 + pad;
  const [width, height, left, right, top, bottom] = [460, 220, 58, 12, 10, 34];
  const toX = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const toY = (y) => height - bottom - ((y - below) / (above - below)) * (height - top - bottom);
  const drawing = svgElement("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const last = known.map((curve) => {
    const [x, y] = curve.points[curve.points.length - 1];
    return `${curve.name} ${figureText(y)} in round ${x}`;
  });
  drawing.setAttribute("aria-label", `${title} over rounds ${x0} to ${all[all.length - 1][0]}: last ${last.join(", ")}.`);
  for (const y of ticks(below, above, 5)) {
    drawing.append(svgElement("line", { class: "grid", x1: left, x2: width - right, y1: toY(y), y2: toY(y) }));
    drawing.append(svgElement("text", { x: left - 6, y: toY(y) + 4, "text-anchor": "end" }, String(y)));
  }
  for (const x of ticks(x0, x1, 6).filter(Number.isInteger)) {
    drawing.append(svgElement("text", { x: toX(x), y: height - bottom + 16, "text-anchor": "middle" }, String(x)));
  }
  drawing.append(svgElement("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  drawing.append(svgElement("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "round"));
  const caption = document.createElement("figcaption");
  caption.append(`${title} `);
  known.forEach((curve) => {
    const look = CLASSES[curves.indexOf(curve) % CLASSES.length];
    const path = curve.points.map(([x, y]) => `${toX(x).toFixed(1)},${toY(y).toFixed(1)}`).join(" ");
    drawing.append(svgElement("polyline", { class: `curve ${look}`, points: path }));
    if (curve.points.length <= 40) {
      for (const [x, y] of curve.points) drawing.append(svgElement("circle", { class: `dot ${look}`, cx: toX(x), cy: toY(y), r: 3 }));
    }
    if (curves.length > 1) {
      const key = document.createElement("span");
      key.className = "key";
      const swatch = svgElement("svg", { viewBox: "0 0 30 12", "aria-hidden": "true" });
      swatch.append(svgElement("line", { class: `curve ${look}`, x1: 0, x2: 30, y1: 6, y2: 6 }));
      key.append(swatch, curve.name);
      caption.append(key);
    }
  });
  const figure = document.createElement("figure");
  figure.append(caption, drawing);
  return figure;
}
