// bullmq for Node: addBulk, finished jobs removed, 300 at once. The same roles and BENCH_* variables as shared.py.
import { createRequire } from "node:module";
import fs from "node:fs";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const require = createRequire(process.cwd() + "/"); // node_modules of the folder this is started in
const { Queue, Worker } = require("bullmq");
const env = process.env;
const settings = JSON.parse(env.BENCH_SETTINGS || "{}");
const connection = { host: "127.0.0.1", port: Number(env.BENCH_PORT), maxRetriesPerRequest: null };
const limit = Number(env.BENCH_LIMIT || 20);
const options = { removeOnComplete: true };
const now = () => process.hrtime.bigint();
const WARM = 20;
const payload = (number) => ({
  id: "task-" + String(number).padStart(6, "0"),
  type: "text_classification",
  input: { text: "Classify this text please: lorem ipsum dolor" },
  priority: 2,
});

function facts() {
  const versions = {};
  for (const name of ["bullmq", "ioredis"])
    versions[name] = JSON.parse(fs.readFileSync(`node_modules/${name}/package.json`)).version;
  return {
    versions,
    runtime: "Node " + process.version.slice(1),
    uvloop: false,
    backlog: [["LLEN", "bull:bench:wait"], ["LLEN", "bull:bench:active"]],
    settings: { concurrency: 300, chunk: 1000, sleep: { concurrency: 1000 } },
  };
}

function agent() {
  if (env.BENCH_WORKLOAD === "latency") {
    const pipe = fs.openSync(env.BENCH_PIPE, "r+");
    return async () => {
      const bytes = Buffer.alloc(8);
      bytes.writeBigInt64LE(now());
      fs.writeSync(pipe, bytes);
    };
  }
  const file = fs.openSync(path.join(env.BENCH_PROGRESS, String(process.pid)), "w+");
  let count = 0, first = 0n, told = 0n;
  const end = () => {
    const last = now();
    first ||= last;
    count += 1;
    if (count % 256 && last - told < 2_000_000n && count < Number(env.BENCH_TASKS)) return; // a write costs more than the task
    told = last;
    const bytes = Buffer.alloc(24);
    [BigInt(count), first, last].forEach((value, index) => bytes.writeBigInt64LE(value, index * 8));
    fs.writeSync(file, bytes, 0, 24, 0);
  };
  if (env.BENCH_WORKLOAD !== "sleep") return async () => end();
  return async () => {
    first ||= now();
    await sleep(100);
    end();
  };
}

async function enqueue(mode, total) {
  const queue = new Queue("bench", { connection });
  await queue.waitUntilReady();
  const items = Array.from({ length: total }, (_, number) => payload(number));
  await queue.add("task", items[0], options);
  const began = now();
  const size = mode === "single" ? 1 : settings.chunk || 1000;
  let count = 0;
  for (let start = 1; start < total && Number(now() - began) < limit * 1e9; start += size) {
    const part = items.slice(start, start + size);
    if (size === 1) await queue.add("task", part[0], options);
    else await queue.addBulk(part.map((data) => ({ name: "task", data, opts: options })));
    count += part.length;
  }
  console.log(JSON.stringify({ count, seconds: Number(now() - began) / 1e9 }));
}

async function latency(samples) {
  const queue = new Queue("bench", { connection });
  await queue.waitUntilReady();
  const pipe = fs.openSync(env.BENCH_PIPE, "r+");
  const times = [];
  const end = Date.now() + limit * 1000;
  for (let number = 0; number < WARM + samples && (Date.now() < end || number <= WARM); number++) {
    const bytes = Buffer.alloc(8);
    const started = new Promise((ok, no) => fs.read(pipe, bytes, 0, 8, null, (error) => (error ? no(error) : ok())));
    const began = now();
    await queue.add("task", payload(number), options);
    await started;
    if (number >= WARM) times.push(Number(bytes.readBigInt64LE() - began));
    await sleep(5);
  }
  console.log(JSON.stringify(times));
}

const [role, ...rest] = process.argv.slice(2);
if (role === "facts") console.log(JSON.stringify(facts()));
else if (role === "worker") new Worker("bench", agent(), { connection, concurrency: settings.concurrency });
else {
  await (role === "enqueue" ? enqueue(rest[0], Number(rest[1])) : latency(Number(rest[0])));
  process.exit(0);
}
