// node hf_gguf_header.mjs MODEL.gguf NODE_FOLDER: names, shapes and types of tensors, and plain metadata.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [model, folder] = process.argv.slice(2);
const entry = createRequire(`${folder}/`).resolve("@huggingface/gguf");
const { gguf } = await import(pathToFileURL(entry));
const { metadata, tensorInfos } = await gguf(model, { allowLocalFile: true });
const tensors = tensorInfos.map((t) => [t.name, t.shape.map(Number), t.dtype]);
const plain = (_, value) => (typeof value === "bigint" ? Number(value) : value);
console.log(JSON.stringify({ metadata, tensors }, plain));
