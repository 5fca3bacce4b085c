// Greedy continuations in llama.cpp, by node-llama-cpp; llama_cpp.py starts it.
//
//     node llama_cpp.mjs FOLDER    FOLDER/node_modules holds node-llama-cpp
//
// Reads one JSON object a line: {"file", "prompts": [text], "tokens": how many}. Writes one a line: {"prompts": the
// tokens of each, "answers": the tokens of each, "texts", "seconds": of the processor for the tokens behind the first,
// "rates": those tokens a second by the clock}, or {"error"}. Exits with 3 where node-llama-cpp is not there.
import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const entry = path.join(path.resolve(process.argv[2]), "node_modules", "node-llama-cpp", "dist", "index.js");
if (!fs.existsSync(entry)) process.exit(3);
const engine = await import(pathToFileURL(entry).href);
const llama = await engine.getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: engine.LlamaLogLevel.error});
const contexts = new Map();

async function contextOf(file) {
    if (!contexts.has(file)) {
        const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
        contexts.set(file, await model.createContext({
            threads: 1, contextSize: 512, flashAttention: false,
            experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
        }));
    }
    return contexts.get(file);
}

function tokensOf(model, prompt) {
    const first = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    return [...first, ...model.tokenize(prompt)];
}

async function answer({file, prompts, tokens}) {
    const context = await contextOf(file), result = {prompts: [], answers: [], texts: [], seconds: [], rates: []};
    for (const prompt of prompts) {
        const asked = tokensOf(context.model, prompt), sequence = context.getSequence(), answered = [];
        let start, used;
        for await (const token of sequence.evaluate(asked, {temperature: 0, yieldEogToken: true})) {
            if (answered.length === 0) [start, used] = [performance.now(), process.cpuUsage()];
            answered.push(token);
            if (answered.length >= tokens) break;
        }
        const {user, system} = process.cpuUsage(used);
        result.seconds.push((user + system) / 1e6);
        result.rates.push((answered.length - 1) / (performance.now() - start) * 1e3);
        result.prompts.push(asked.map(Number));
        result.answers.push(answered.map(Number));
        result.texts.push(context.model.detokenize(answered, true));
        sequence.dispose();
    }
    return result;
}

for await (const line of readline.createInterface({input: process.stdin})) {
    const told = await answer(JSON.parse(line)).catch((error) => ({error: String(error)}));
    console.log(JSON.stringify(told));
}
process.exit(0);
