// pi: ~/.pi/agent/extensions/xaiproxy.js, or pi --extension pi.js; then: pi --model xaiproxy/grok-4.5
export default function (pi) {
  pi.registerProvider("xaiproxy", {
    name: "xaiproxy",
    baseUrl: "http://127.0.0.1:9090/v1",
    apiKey: process.env.XAIPROXY_KEY ?? "none",
    api: "openai-responses",
    models: [{
      id: "grok-4.5", name: "Grok 4.5", reasoning: true, input: ["text", "image"],
      contextWindow: 500000, maxTokens: 64000,
      cost: {input: 0, output: 0, cacheRead: 0, cacheWrite: 0},
    }],
  });
}
