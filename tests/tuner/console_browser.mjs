// A real browser on the console. Told as JSON: modules, chromium, url, read, operate, hostile. Says what it saw as JSON.
import { createRequire } from "node:module";
import { join } from "node:path";

const told = JSON.parse(process.argv[2]);
const { chromium } = createRequire(join(told.modules, "package.json"))("playwright-core");
const home = `${told.url}/console/`;
const saw = { complaints: [], elsewhere: [], violations: [] };
const browser = await chromium.launch({ executablePath: told.chromium, args: ["--no-sandbox"] });

async function opened(options = {}) {
  const context = await browser.newContext(options);
  await context.exposeBinding("violated", (_, words) => saw.violations.push(words));
  await context.addInitScript(() => {
    document.addEventListener("securitypolicyviolation", (e) => window.violated(`${e.violatedDirective} ${e.blockedURI}`));
  });
  const page = await context.newPage();
  page.on("pageerror", (error) => saw.complaints.push(String(error)));
  page.on("dialog", (dialog) => { saw.complaints.push(`dialog ${dialog.message()}`); dialog.dismiss(); });
  page.on("console", (message) => {
    const refused = /status of (401|403|422|503)/.test(message.text()); // asked for on purpose below
    if (["error", "warning"].includes(message.type()) && !refused) saw.complaints.push(message.text());
  });
  page.on("request", (request) => { if (!request.url().startsWith(`${told.url}/`) && !request.url().startsWith("data:")) saw.elsewhere.push(request.url()); });
  return page;
}

async function signedIn(options = {}, token = told.read) {
  const page = await opened(options);
  await page.goto(`${home}#token=${token}`);
  await page.waitForSelector("#now dd");
  await page.waitForSelector("#why li");
  return page;
}

/** Problems that a person with a screen reader or weak eyes would have. Runs in the page. */
function problems() {
  const found = [];
  const shown = (node) => node.checkVisibility({ checkVisibilityCSS: true }) && node.getClientRects().length > 0;
  const name = (node) => (node.getAttribute("aria-label") || [...(node.labels ?? [])].map((x) => x.textContent).join(" ")
    || (["BUTTON", "A", "SUMMARY"].includes(node.tagName) ? node.textContent : "")).trim();
  for (const node of document.querySelectorAll("a, button, select, input, summary, [tabindex='0'], [role=img], [role=region]")) {
    if (shown(node) && !name(node)) found.push(`no name: ${node.outerHTML.slice(0, 80)}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  if (new Set(ids).size !== ids.length) found.push("an id is there twice");
  for (const node of document.querySelectorAll("[aria-labelledby], [aria-describedby], label[for]")) {
    const id = node.getAttribute("aria-labelledby") ?? node.getAttribute("aria-describedby") ?? node.getAttribute("for");
    if (!document.getElementById(id)) found.push(`names ${id}, which is not there`);
  }
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].filter(shown).map((node) => Number(node.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1 || levels[0] !== 1) found.push(`headings ${levels}`);
  if (levels.some((level, i) => i > 0 && level > levels[i - 1] + 1)) found.push(`a heading level is left out: ${levels}`);
  if (!document.documentElement.lang || !document.title) found.push("no language or no title");
  for (const landmark of ["main"]) if (document.querySelectorAll(landmark).length !== 1) found.push(`not one ${landmark}`);
  for (const table of document.querySelectorAll("table")) {
    if (shown(table) && table.rows.length && (!table.caption || table.querySelector("th:not([scope])"))) found.push("a table without caption or scope");
  }
  const channel = (x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const c = rgb(getComputedStyle(at).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let least = 99, texts = 0;
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    const field = ["INPUT", "SELECT"].includes(node.tagName);
    if (!(own || field) || !shown(node) || node.matches("title, script, option")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(rgb(node instanceof SVGElement ? style.fill : style.color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    texts += 1;
    least = Math.min(least, ratio);
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: ${node.outerHTML.slice(0, 60)}`);
    if (field) {
      const [c, d] = [light(rgb(style.borderTopColor)), light(behind(node.parentElement))];
      const edge = (Math.max(c, d) + 0.05) / (Math.min(c, d) + 0.05);
      if (edge < 3) found.push(`edge ${edge.toFixed(2)}: ${node.id}`);
    }
  }
  return { found, least: Number(least.toFixed(2)), texts };
}

/** Every control in the order of the page, and the order in which Tab reaches them. */
async function tabbed(page) {
  const wanted = await page.evaluate(() => {
    const all = [...document.querySelectorAll("a[href], button, select, input, summary, [tabindex]:not([tabindex='-1'])")];
    const shown = all.filter((node) => node.checkVisibility() && !node.disabled);
    shown.forEach((node, i) => { node.dataset.tab = i; });
    document.activeElement?.blur();
    return shown.length;
  });
  const reached = [], bare = [];
  await page.evaluate(() => { getSelection().removeAllRanges(); scrollTo(0, 0); document.body.tabIndex = -1; document.body.focus(); });
  for (let i = 0; i < wanted; i += 1) {
    await page.keyboard.press("Tab");
    const [at, outlined] = await page.evaluate(() => [document.activeElement.dataset.tab ?? document.activeElement.tagName,
      getComputedStyle(document.activeElement).outlineStyle !== "none"]);
    reached.push(at);
    if (!outlined) bare.push(at);
  }
  return { wanted, inOrder: reached.every((at, i) => at === String(i)), reached: new Set(reached).size, bare };
}

const says = (page, words) => page.waitForFunction((w) => document.getElementById("says").textContent.includes(w), words);
const ordered = (page, words) => page.waitForFunction((w) => document.getElementById("ordered").textContent === w, words);
const nowSays = (page, words) => page.waitForFunction((w) => document.getElementById("now").textContent.includes(w), words);

try {
  { // A stranger
    const page = await opened();
    const answer = await page.goto(home);
    saw.stranger = { status: answer.status(), title: await page.title(), text: await page.textContent("body") };
    saw.strangerProblems = await page.evaluate(problems);
    await page.fill("#token", "x".repeat(40));
    await page.keyboard.press("Enter");
    await says(page, "This is not the token");
    await page.fill("#token", told.read);
    await page.click("button");
    await page.waitForSelector("#now dd");
    saw.byForm = await page.title();
    await page.context().close();
  }
  { // A reader, in both themes
    const page = await signedIn({ viewport: { width: 1100, height: 900 }, reducedMotion: "reduce", colorScheme: "light" });
    saw.address = page.url();
    saw.scriptsSee = await page.evaluate(() => document.cookie);
    saw.headings = await page.locator("h2").allTextContents();
    await page.locator("#heat-section").scrollIntoViewIfNeeded();
    await page.waitForFunction(() => document.getElementById("map").getAttribute("aria-label").includes("layers by"));
    for (const summary of await page.locator("summary").all()) await summary.click();
    await page.waitForFunction(() => document.querySelectorAll("#cost-table tr").length > 1);
    saw.themes = {};
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    saw.themes.light = [await ground(), await page.evaluate(problems)];
    if (told.pictures) await page.screenshot({ path: join(told.pictures, "light.png"), fullPage: true });
    await page.emulateMedia({ colorScheme: "dark", reducedMotion: "reduce" });
    saw.themes.dark = [await ground(), await page.evaluate(problems)];
    if (told.pictures) await page.screenshot({ path: join(told.pictures, "dark.png"), fullPage: true });
    await page.selectOption("#theme", "light");
    saw.themes.chosenLight = [await ground(), await page.evaluate(problems)];
    await page.reload();
    await page.waitForSelector("#now dd");
    saw.themes.keptLight = [await ground()];
    await page.emulateMedia({ colorScheme: "light", reducedMotion: "reduce" });
    await page.selectOption("#theme", "dark");
    saw.themes.chosenDark = [await ground(), await page.evaluate(problems)];
    await page.selectOption("#theme", "");
    saw.moving = await page.evaluate(() => [document.getAnimations().length, getComputedStyle(document.documentElement).scrollBehavior]);
    await page.waitForSelector("#why li");
    await page.click("#hold"); // so that nothing is redrawn under Tab
    saw.tab = await tabbed(page);
    await page.click("#hold");
    saw.hostile = await page.evaluate((words) => ({
      scripts: document.scripts.length, images: document.images.length,
      named: [...document.getElementById("which").options].some((o) => o.textContent === words),
      reason: document.getElementById("why").textContent.includes("<img src=x onerror=alert(1)>"),
    }), told.hostile);
    // The map by keyboard, and the open decision that stays open
    await page.focus("#map");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowRight");
    saw.cell = await page.textContent("#cell");
    const first = page.locator("#why details").first();
    await first.locator("summary").click();
    saw.why = await first.textContent();
    // What changes anything is not there, and refused
    saw.reader = await page.evaluate(async () => {
      const ask = (headers) => fetch("api/orders", { method: "PUT", headers, body: JSON.stringify({ deployment: "default/a", seen: 0, paused: true }) });
      return { hidden: document.getElementById("act").hidden, put: (await ask({ "X-Moestack-Console": "1" })).status, bare: (await ask({})).status };
    });
    await page.selectOption("#which", told.hostile);
    await page.waitForFunction(() => document.getElementById("now").textContent.includes("not known yet"));
    await page.waitForFunction(() => document.getElementById("heat-says").textContent.includes("No map"));
    saw.other = await page.textContent("#heat-says");
    await page.selectOption("#which", "default/a");
    await nowSays(page, "γ ");
    // A tuner that does not answer is told, and forgotten when it does
    await page.route("**/api/status*", (route) => route.abort());
    await page.waitForSelector("#wrong:not([hidden])");
    saw.gone = await page.textContent("#wrong");
    await page.unroute("**/api/status*");
    await page.waitForSelector("#wrong", { state: "hidden" });
    saw.complaints = saw.complaints.filter((words) => !words.includes("net::ERR_FAILED")); // the one just made
    await page.context().close();
  }
  { // A narrow screen
    const page = await signedIn({ viewport: { width: 360, height: 740 }, hasTouch: true });
    for (const summary of await page.locator("summary").all()) await summary.click();
    await page.waitForTimeout(300);
    saw.narrow = await page.evaluate(() => ({ page: document.documentElement.scrollWidth,
      wide: [...document.querySelectorAll("body *")].filter((n) => n.getBoundingClientRect().right > 361 && !n.closest(".wide, .skip"))
        .map((n) => n.outerHTML.slice(0, 60)) }));
    if (told.pictures) await page.screenshot({ path: join(told.pictures, "narrow.png"), fullPage: true });
    await page.context().close();
  }
  { // Who may operate, by keyboard alone
    const page = await signedIn();
    await page.focus("#operator");
    await page.keyboard.type("y".repeat(40));
    await page.keyboard.press("Enter");
    await says(page, "Refused");
    await page.keyboard.type(told.operate);
    await page.keyboard.press("Enter");
    await says(page, "Unlocked");
    saw.focusAfter = await page.evaluate(() => document.activeElement.id);
    await page.keyboard.press("Enter");
    await says(page, "The tuner is paused");
    await nowSays(page, "Auto, paused");
    await ordered(page, "Ordered: paused.");
    await page.keyboard.press("Enter");
    await nowSays(page, "Auto");
    await says(page, "goes on");
    await page.focus("#knob");
    await page.selectOption("#knob", "engine.maxActiveSeqs");
    await page.fill("#value", "24");
    await page.keyboard.press("Enter");
    await says(page, "Pinned engine.maxActiveSeqs");
    await ordered(page, "Ordered: engine.maxActiveSeqs at 24.");
    await page.fill("#value", "9999");
    await page.keyboard.press("Enter");
    await says(page, "Refused");
    saw.refused = await page.textContent("#says");
    saw.operatorProblems = await page.evaluate(problems);
    await page.click("#unpin button");
    await says(page, "Unpinned");
    await ordered(page, "Ordered: nothing is held.");
    await page.click("#lock");
    await page.waitForSelector("#unlock:not([hidden])");
    await page.click("#leave");
    await page.waitForSelector("#token");
    saw.left = await page.title();
    await page.context().close();
  }
  { // Another page of this browser cannot make it pause, though it has the right
    const page = await signedIn({}, told.operate);
    const other = await page.context().newPage();
    await other.goto(`${told.other}/`);
    await other.evaluate(async (url) => {
      await fetch(`${url}/console/api/orders`, { method: "PUT", credentials: "include", mode: "cors", headers: { "X-Moestack-Console": "1" },
        body: JSON.stringify({ deployment: "default/a", seen: 0, paused: true }) }).catch(() => null);
      await fetch(`${url}/console/api/session`, { method: "POST", credentials: "include", mode: "no-cors", body: "{}" }).catch(() => null);
    }, told.url);
    await page.context().close();
  }
  { // A slow link: 400 kbit/s, 400 ms
    const page = await opened();
    const line = await page.context().newCDPSession(page);
    await line.send("Network.enable");
    await line.send("Network.emulateNetworkConditions", { offline: false, latency: 400, downloadThroughput: 50_000, uploadThroughput: 50_000 });
    const asked = [];
    let bytes = 0;
    line.on("Network.loadingFinished", (event) => { bytes += event.encodedDataLength; });
    page.on("request", (request) => { if (!request.url().startsWith("data:")) asked.push(new URL(request.url()).pathname); });
    await page.goto(`${home}#token=${told.read}`);
    await page.waitForSelector("#now dd");
    saw.slow = { requests: asked.length, bytes, asked };
    await page.waitForSelector("#chart-met");
    bytes = 0;
    await page.waitForTimeout(10_000);
    saw.slow.bytesInTenSeconds = bytes;
    await page.context().close();
  }
} catch (error) {
  saw.broke = String(error.stack ?? error);
} finally {
  await browser.close();
}
process.stdout.write(JSON.stringify(saw));
