// bullmq for Node: own ids (deduplicated), addBulk, finished jobs removed, 300 at once. The same roles and BENCH_* variables as shared.py.
import { createRequire } from "node:module";
import { spawn } from "node:child_process";
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
const PROBES = 3;
const PROBE_BULK = 100;
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
  if (env.BENCH_WORKLOAD === "latency" || env.BENCH_WORKLOAD === "hold") {
    const pipe = fs.openSync(env.BENCH_PIPE, "r+");
    return async () => {
      const bytes = Buffer.alloc(8);
      bytes.writeBigInt64LE(now());
      fs.writeSync(pipe, bytes);
      if (env.BENCH_WORKLOAD === "hold") await sleep(60_000);
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

const send = (queue, item) => queue.add("task", item, { ...options, jobId: item.id });
const sendMany = (queue, items) =>
  queue.addBulk(items.map((data) => ({ name: "task", data, opts: { ...options, jobId: data.id } })));

// A call that returns before the stopped server has gone on has not waited for it; see shared.py.
async function whileStopped(call) {
  const pid = Number(env.BENCH_SERVER);
  const shell = spawn("sh", ["-c", `kill -STOP ${pid}; echo stopped; sleep 0.3; echo goes on; kill -CONT ${pid}`]);
  const ended = new Promise((ok) => shell.on("close", ok));
  let heard = 0;
  await new Promise((ok) => shell.stdout.on("data", () => (++heard, ok())));
  await sleep(20);
  await call();
  await new Promise(setImmediate);
  await new Promise(setImmediate);
  const waited = heard > 1;
  await ended;
  return waited;
}

async function probe() {
  const queue = new Queue("bench", { connection });
  await queue.waitUntilReady();
  for (const number of [0, 1, 1]) await send(queue, payload(number));
  const found = { single: true, bulk: true, sent: 2 + PROBES * (1 + PROBE_BULK) };
  for (let n = 0; n < PROBES; n++) found.single = (await whileStopped(() => send(queue, payload(2 + n)))) && found.single;
  for (let n = 0; n < PROBES; n++) {
    const part = Array.from({ length: PROBE_BULK }, (_, i) => payload(2 + PROBES + n * PROBE_BULK + i));
    found.bulk = (await whileStopped(() => sendMany(queue, part))) && found.bulk;
  }
  console.log(JSON.stringify(found));
}

async function enqueue(mode, total) {
  const queue = new Queue("bench", { connection });
  await queue.waitUntilReady();
  const items = Array.from({ length: total }, (_, number) => payload(number));
  await send(queue, items[0]);
  const began = now();
  const size = mode === "single" ? 1 : settings.chunk || 1000;
  let count = 0;
  for (let start = 1; start < total && Number(now() - began) < limit * 1e9; start += size) {
    const part = items.slice(start, start + size);
    await (size === 1 ? send(queue, part[0]) : sendMany(queue, part));
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
    await send(queue, payload(number));
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
  await { enqueue: () => enqueue(rest[0], Number(rest[1])), latency: () => latency(Number(rest[0])), probe }[role]();
  process.exit(0);
}
