// Drives the official Node clients against a gateway and prints what they made of it: one JSON object.
// The text of the last message tells the upstream behind the gateway what to do.
import { createRequire } from "node:module";

const { sdks, url, key, model } = JSON.parse(process.argv[2]);
const require = createRequire(sdks + "/package.json");
const { OpenAI } = require("openai");
const { Anthropic } = require("@anthropic-ai/sdk");
const { jsonSchemaOutputFormat } = require("@anthropic-ai/sdk/helpers/json-schema");

const schema = {
  type: "object",
  properties: { city: { type: "string" }, degrees: { type: "integer" } },
  required: ["city", "degrees"],
  additionalProperties: false,
};
const say = (text) => [{ role: "user", content: text }];
const openai = new OpenAI({ apiKey: key, baseURL: url + "/v1", maxRetries: 0 });
const anthropic = new Anthropic({ apiKey: key, baseURL: url, maxRetries: 0 });
const chat = (text, more = {}) => openai.chat.completions.create({ model, messages: say(text), ...more });
const asked = (text, more = {}) => ({ model, max_tokens: 50, messages: say(text), ...more });
const failure = async (call) => {
  try {
    await call();
  } catch (error) {
    return [error.constructor.name, error.status ?? null];
  }
  return null;
};

const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object" } } }];
const results = { openai: {}, anthropic: {} };

let got = results.openai;
got.chat = (await chat("hello")).choices[0].message.content;
got.stream = "";
for await (const chunk of await chat("hello", { stream: true })) got.stream += chunk.choices[0]?.delta.content ?? "";
const call = (await chat("tools", { tools })).choices[0].message.tool_calls[0];
got.tool = JSON.parse(call.function.arguments);
const runner = openai.chat.completions.stream({ model, messages: say("tools"), tools });
got.streamed_tool = JSON.parse((await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function.arguments);
const response_format = { type: "json_schema", json_schema: { name: "weather", schema, strict: true } };
const parsed = await openai.chat.completions.parse({ model, messages: say("json"), response_format });
got.parsed = JSON.parse(parsed.choices[0].message.content);
got.models = (await openai.models.list()).data.map((one) => one.id);
got.errors = {
  400: await failure(() => chat("refuse")),
  401: await failure(() => openai.withOptions({ apiKey: key + "x" }).chat.completions.create({ model, messages: say("hello") })),
  404: await failure(() => chat("hello", { model: "another" })),
  413: await failure(() => chat("x".repeat(9000))),
  529: await failure(() => chat("overload")),
  502: await failure(() => chat("fail")),
  cut: await failure(async () => {
    for await (const _ of await chat("cut", { stream: true }));
  }),
};

got = results.anthropic;
const message = await anthropic.messages.create(asked("hello"));
got.message = [message.content.at(-1).text, message.stop_reason, message.usage.output_tokens];
got.request_id = typeof message._request_id;
got.stream = await anthropic.messages.stream(asked("hello")).finalText();
const tool = { name: "weather", input_schema: { type: "object" } };
got.tool = (await anthropic.messages.create(asked("tools", { tools: [tool] }))).content[0].input;
const streamed = await anthropic.messages.stream(asked("tools", { tools: [tool] })).finalMessage();
got.streamed_tool = [streamed.content[0].input, streamed.stop_reason];
const output_config = { format: jsonSchemaOutputFormat(schema) };
got.parsed = (await anthropic.messages.parse(asked("json", { output_config }))).parsed_output;
got.errors = {
  400: await failure(() => anthropic.messages.create(asked("refuse"))),
  401: await failure(() => anthropic.withOptions({ apiKey: key + "x" }).messages.create(asked("hello"))),
  404: await failure(() => anthropic.messages.create(asked("hello", { model: "another" }))),
  413: await failure(() => anthropic.messages.create(asked("x".repeat(9000)))),
  529: await failure(() => anthropic.messages.create(asked("overload"))),
  502: await failure(() => anthropic.messages.create(asked("fail"))),
  count: await failure(() => anthropic.messages.countTokens({ model, messages: say("hello") })),
  cut: await failure(() => anthropic.messages.stream(asked("cut")).finalText()),
};
console.log(JSON.stringify(results));
