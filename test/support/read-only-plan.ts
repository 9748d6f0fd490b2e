/**
 * Owns: a process that proves a plan three times on a token directory it cannot write to, the third time while a
 * session of its own is logged in, as the engine's would be.
 * Must not know: how the directory was made.
 * Runs: as a child process of a test: `read-only-plan.ts MODULE LABEL CHAIN`, PIN in KEYGATE_TEST_PIN. Prints what is
 * not ok, and whether the token was known from memory only.
 */
import { readPin } from '../../src/config/pin.ts';
import { findToken, login, openModule, openSession } from '../../src/pkcs11/module.ts';
import { examinePlan } from '../../src/pkcs11/plan.ts';
import { planConfig, tokenConfig } from './plan-config.ts';
import { unguarded } from './softhsm.ts';

const [path = '', label = '', chain = ''] = process.argv.slice(2);
const nobody = 65_534;
if (process.getuid?.() === 0) {
  // Root may write everywhere.
  process.setgid?.(nobody);
  process.setuid?.(nobody);
}

const pin = { env: 'KEYGATE_TEST_PIN' };
const config = planConfig(
  [tokenConfig({ module: path, label, pinFile: '' }, { pin })],
  [{ name: 'www', chain, key: { object: 'www' }, tokens: ['hsm'], ocsp: 'off' }],
);
const faults = () =>
  examinePlan(config, { guard: unguarded, readPin })
    .findings.filter(({ severity }) => severity !== 'ok')
    .map(({ message }) => message);

const first = faults();
const second = faults();
const { module } = openModule(path, true, unguarded);
const found = findToken(module, { token: label });
login(openSession(found), found, () => readPin(pin), unguarded);
const third = faults();
console.log(
  JSON.stringify({
    faults: [...first, ...second, ...third],
    remembered: findToken(module, { token: label }).remembered,
  }),
);
