/**
 * Owns: what a process does to the fault module that the test itself cannot: be lost, or break a rule from the start.
 * Must not know: what the test makes of it.
 * Runs: in a process of its own: `bystander.ts WHAT MODULE PIN`.
 */
import { writeFileSync } from 'node:fs';
import pkcs11js from 'pkcs11js';

const [, , what = '', module = '', pin = ''] = process.argv;
const pkcs11 = new pkcs11js.PKCS11();
pkcs11.load(module);
const deeds: Readonly<Record<string, () => void>> = {
  'before C_Initialize'() {
    pkcs11.C_GetSlotList(true);
  },
  'on the I/O thread'() {
    // Of the main thread, which is the one that calls (proc_pid_comm(5)).
    writeFileSync('/proc/self/comm', 'keygate-io');
    pkcs11.C_Initialize({ flags: pkcs11js.CKF_OS_LOCKING_OK });
  },
  sign() {
    pkcs11.C_Initialize({ flags: pkcs11js.CKF_OS_LOCKING_OK });
    for (const slot of pkcs11.C_GetSlotList(true)) {
      const session = pkcs11.C_OpenSession(slot, pkcs11js.CKF_SERIAL_SESSION);
      pkcs11.C_Login(session, pkcs11js.CKU_USER, pin);
      pkcs11.C_FindObjectsInit(session, [{ type: pkcs11js.CKA_CLASS, value: pkcs11js.CKO_PRIVATE_KEY }]);
      const [key = Buffer.alloc(8)] = pkcs11.C_FindObjects(session, 1);
      pkcs11.C_FindObjectsFinal(session);
      pkcs11.C_SignInit(session, { mechanism: pkcs11js.CKM_ECDSA }, key);
      pkcs11.C_Sign(session, Buffer.alloc(32), Buffer.alloc(64));
    }
  },
};
deeds[what]?.();
