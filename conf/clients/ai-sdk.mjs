// Vercel's AI SDK: npm install ai @ai-sdk/xai
import {createXai} from "@ai-sdk/xai";
import {streamText} from "ai";

const xai = createXai({baseURL: "http://127.0.0.1:9090/v1", apiKey: process.env.XAIPROXY_KEY ?? "none"});

const {textStream} = streamText({model: xai.responses("grok-4.5"), prompt: "Say hello."});
for await (const text of textStream) process.stdout.write(text);
console.log();
