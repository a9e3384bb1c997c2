// What is drawn, as plain functions: the colour scale, charts as lists of points, numbers as words. No page is touched.

/** OKLCH to sRGB, 0 to 1 each; outside of what a screen can show it is cut. After B. Ottosson, "A perceptual color
 *  space for image processing" (2020). */
export function srgb(lightness, chroma, hue) {
  const angle = (hue * Math.PI) / 180;
  const a = chroma * Math.cos(angle), b = chroma * Math.sin(angle);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((x) => {
    const cut = Math.min(1, Math.max(0, x));
    return cut <= 0.0031308 ? 12.92 * cut : 1.055 * cut ** (1 / 2.4) - 0.055;
  });
}

/** From dark violet to bright yellow: lightness alone tells the order, so that no kind of colour vision is needed. */
export function scale(t) {
  const at = Math.min(1, Math.max(0, t));
  return srgb(0.24 + 0.68 * at, 0.09 + 0.06 * Math.sin(Math.PI * at), 305 - 200 * at).map((x) => Math.round(255 * x));
}

/** Where a load over the mean lies on the scale: a quarter at its foot, four times at its head. */
export function heat(loadOverMean) {
  return loadOverMean <= 0 ? 0 : Math.min(1, Math.max(0, Math.log2(loadOverMean) / 4 + 0.5));
}

/** Relative luminance of a colour (0 to 255 each), as WCAG 2 defines it. */
export function luminance(rgb) {
  const [r, g, b] = rgb.map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

export const DASH = "–";
const nothing = (x) => x === null || x === undefined || Number.isNaN(x);
export const share = (x) => (nothing(x) ? DASH : `${(100 * x).toFixed(x > 0.995 && x < 1 ? 2 : 1)} %`);
export const number = (x, digits = 2) => (nothing(x) ? DASH : Number(x.toFixed(digits)).toLocaleString("en-GB"));
export const seconds = (x) =>
  nothing(x) ? DASH : x < 1 ? `${(1000 * x).toFixed(0)} ms` : x < 120 ? `${x.toFixed(x < 10 ? 1 : 0)} s`
    : x < 7200 ? `${Math.round(x / 60)} min` : `${(x / 3600).toFixed(1)} h`;
export const usd = (x) => {
  if (nothing(x)) return DASH;
  const amount = Number(x);
  const digits = amount === 0 || Math.abs(amount) >= 1 ? 2 : 6;
  return `$${amount.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: digits })}`;
};
export const clock = (s) => new Date(1000 * s).toLocaleTimeString("en-GB");
export const moment = (s) => new Date(1000 * s).toLocaleString("en-GB");

/** The upper end of an axis: 1, 2 or 5 times a power of ten. */
export function ceiling(highest) {
  if (!(highest > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(highest));
  return [1, 2, 5, 10].find((step) => step * power >= highest * 0.999) * power;
}

/** An SVG path through (time, value) pairs; a value that is not known, or a gap longer than `gap` seconds, breaks it. */
export function path(points, box, gap) {
  const parts = [];
  let before = null;
  for (const [at, value] of points) {
    if (nothing(value)) { before = null; continue; }
    const x = box.left + (box.width * (at - box.from)) / (box.to - box.from || 1);
    const y = box.top + box.height * (1 - Math.min(1, Math.max(0, value / box.high)));
    parts.push(`${before === null || at - before > gap ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`);
    // A point alone would be no line.
    if (before === null || at - before > gap) parts.push("h1");
    before = at;
  }
  return parts.join("");
}

/** Every n-th row, the last one among them: at most `most`. */
export function thinned(rows, most) {
  const step = Math.max(1, Math.ceil(rows.length / most));
  return rows.filter((_, index) => (rows.length - 1 - index) % step === 0);
}

/** Words for a line: its name, now, lowest and highest. */
export function summary(name, values, word) {
  const known = values.filter((x) => !nothing(x));
  if (known.length === 0) return `${name}: nothing is known yet`;
  const last = values.at(-1);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  return `${name}: ${nothing(last) ? "not known now" : `${word(last)} now`}, from ${word(low)} to ${word(high)}`;
}
