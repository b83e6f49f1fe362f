// node node_llama_cpp_top.mjs MODEL.gguf PROMPTS.json NODE_FOLDER: the likeliest next tokens.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [model, prompts, folder] = process.argv.slice(2);
const entry = createRequire(`${folder}/`).resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, skipDownload: true });
const loaded = await llama.loadModel({ modelPath: model, gpuLayers: 0 });
const context = await loaded.createContext({ contextSize: 256, threads: 1 });
const sequence = context.getSequence();
const tops = [];
for (const { tokens } of JSON.parse(readFileSync(prompts))) {
  await sequence.clearHistory();
  const asked = { generateNext: { probabilities: true, options: { temperature: 0 } } };
  const answers = await sequence.controlledEvaluate([...tokens.slice(0, -1), [tokens.at(-1), asked]]);
  const { probabilities } = answers.at(-1).next;
  tops.push([...probabilities].slice(0, 5).map(([token, value]) => [token, Math.log(value)]));
}
console.log(JSON.stringify(tops));
process.exit(0);
