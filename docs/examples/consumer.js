// Take each event of a spool exactly once: node consumer.js CURSOR DIRECTORY
//
// A batch of events is committed when its file has its name in DIRECTORY, which is its number.
// Whatever is killed, and when: start this again.
'use strict';
const { spawn } = require('node:child_process');
const fs = require('node:fs');
const readline = require('node:readline');

const [cursor, directory] = process.argv.slice(2);

function commit(number, events) {
  const name = `${directory}/${number}`;
  if (fs.existsSync(name)) return; // only the answer was missing
  const file = fs.openSync(`${directory}/.new`, 'w');
  for (const event of events) fs.writeSync(file, JSON.stringify(event) + '\n');
  fs.fsyncSync(file);
  fs.closeSync(file);
  fs.renameSync(`${directory}/.new`, name); // the commit: the events and their number
}

fs.mkdirSync(directory, { recursive: true });
const follow = spawn('chaperone', ['follow', '--cursor', cursor], {
  stdio: ['pipe', 'pipe', 'inherit'],
});
follow.on('exit', (code) => { process.exitCode = code ?? 1; });
let events = [];
readline.createInterface({ input: follow.stdout }).on('line', (line) => {
  const event = JSON.parse(line); // the bytes of an output are in event.text or event.base64
  if (event.event !== 'batch') return events.push(event);
  commit(event.batch, events);
  events = [];
  follow.stdin.write(`${event.batch}\n`);
});
