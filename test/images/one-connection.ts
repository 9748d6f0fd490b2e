/**
 * Owns: a client that keeps one connection and asks on it again and again: exit status 0 when each request was answered on it.
 * Runs: in the machine of systemd.image.ts: `one-connection.ts FOR_MS FILE`, where FILE is made after the first answer.
 */
import { writeFileSync } from 'node:fs';
import { Agent, get } from 'node:https';
import { setTimeout as pause } from 'node:timers/promises';

const [, , forMs = '', answered = ''] = process.argv;
const agent = new Agent({ keepAlive: true, maxSockets: 1 });
const ports = new Set();
const end = performance.now() + Number(forMs);
while (performance.now() < end) {
  await new Promise((resolve, reject) => {
    const request = get(
      { host: '127.0.0.1', servername: 'www.example.org', rejectUnauthorized: false, agent },
      (response) => {
        ports.add(response.socket.localPort);
        response.resume().on('end', resolve).on('error', reject);
      },
    );
    request.on('error', reject);
  });
  writeFileSync(answered, '');
  await pause(50);
}
if (ports.size !== 1) throw new Error(`expected 1 connection, found ${ports.size}`);
process.exit(0);
