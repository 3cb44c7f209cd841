// The page in a real browser: node page.mjs ADDRESS CHROMIUM FOLDER, with playwright-core in FOLDER, where pictures go too.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createRequire } from "node:module";
import path from "node:path";

const [address, named, folder] = process.argv.slice(2);
const chromium = named.includes("/") ? named : execFileSync("which", [named], { encoding: "utf8" }).trim();
const { chromium: browsers } = createRequire(path.resolve(folder, "here.js"))("playwright-core");
const browser = await browsers.launch({ executablePath: chromium, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 900, height: 700 } });
const wrong = [];
page.on("pageerror", (error) => wrong.push(String(error)));
page.on("console", (said) => { if (said.type() === "error") wrong.push(said.text()); });
page.on("request", (request) => { if (!request.url().startsWith(address)) wrong.push(request.url()); });

const picture = (name) => page.screenshot({ path: path.join(folder, name) });
const answers = () => page.locator("article.assistant .text").allTextContents();
const ended = () => page.waitForFunction(() => document.getElementById("stop").disabled);

async function ask(text) {
  await page.fill("#message", text);
  await page.press("#message", "Enter");
}

await page.goto(address);
await page.click("summary");
await page.waitForFunction(() => document.getElementById("model").options.length > 0);
assert.deepEqual(await page.locator("#model option").allTextContents(), ["tales"], "models that talk");
await page.fill("#temperature", "0");
await page.fill("#tokens", "40");
await page.click("summary");

await ask("Tell me a story about a brave mouse. <b>日本</b>");
await page.waitForSelector("article.assistant .note");
await ended();
let given = await answers();
assert.equal(given.length, 1);
assert.match(given[0], /mouse/);
assert.equal(await page.locator("article.user b").count(), 0, "what is written is text and no markup");
assert.match(await page.textContent(".note"), /^40 tokens, .* tokens\/s, first after .* cut short$/);

await ask("And then?");
await page.waitForFunction(() => document.querySelectorAll("article.assistant .note").length === 2);
const note = (await page.locator(".note").allTextContents())[1];
const [, prompt, known] = note.match(/(\d+) in the prompt, (\d+) known/).map(Number);
assert.ok(known > 40 && known < prompt, note);
await picture("page.png");

await page.click("summary");
await page.fill("#tokens", "");
await page.click("summary");
await ask("A long one, please.");
await page.waitForFunction(() => document.querySelectorAll("article.assistant")[2]?.querySelector(".text").textContent.length > 20);
await page.click("#stop");
await ended();
given = await answers();
assert.ok(given[2].length > 20);

await page.click("#new");
assert.deepEqual(await answers(), []);
await page.click("#theme");
await page.setViewportSize({ width: 380, height: 640 });
await ask("Tell me about a cat.");
await page.waitForSelector("article.assistant .note");
const [inside, outside] = await page.evaluate(() => [document.documentElement.scrollWidth, window.innerWidth]);
assert.ok(inside <= outside, `the page is ${inside} wide in a window of ${outside}`);
await picture("page-narrow.png");

assert.deepEqual(wrong, []);
await browser.close();
console.log("the page answers, remembers, stops and fits a telephone");
