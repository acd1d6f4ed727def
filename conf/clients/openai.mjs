// OpenAI's library for JavaScript: npm install openai. OPENAI_BASE_URL and OPENAI_API_KEY do the same.
import OpenAI from "openai";

// Milliseconds. The library's default is ten minutes, and a reasoning model may be silent for longer.
const client = new OpenAI({
  baseURL: "http://127.0.0.1:9090/v1", apiKey: process.env.XAIPROXY_KEY ?? "none", timeout: 3600_000,
});

const stream = await client.responses.create({model: "grok-4.5", input: "Say hello.", stream: true});
for await (const event of stream) {
  if (event.type === "response.output_text.delta") process.stdout.write(event.delta);
}
console.log();
