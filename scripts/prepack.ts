/**
 * Owns: what `npm pack` needs beside the checkout: dist/ with its list of parts and their licences, and a pkcs11js that can
 * be installed without a compiler.
 * Must not know: what is in them.
 * Runs: by npm, before it packs.
 *
 * The package carries its dependencies (`bundleDependencies`): an installation has the versions of the lock file, which the
 * SBOM names, and needs neither a registry nor install scripts. Only Node comes from outside.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const root = join(import.meta.dirname, '..');
const pkcs11js = join(root, 'node_modules/pkcs11js');
const compiled = 'build/Release/pkcs11.node';

main();

function main(): void {
  for (const script of ['build.ts', 'sbom.ts', 'licences.ts'])
    execFileSync(process.execPath, [join(import.meta.dirname, script)], { cwd: root, stdio: 'inherit' });
  sealPkcs11js();
}

/**
 * npm packs of a bundled package what that one's own `files` names, which for pkcs11js is its source and not what was compiled
 * of it; and it compiles whatever has a binding.gyp. In this checkout `npm ci` brings the source back.
 */
function sealPkcs11js(): void {
  if (!existsSync(join(pkcs11js, compiled)))
    throw new Error(`node_modules/pkcs11js/${compiled} is missing: run scripts/packages`);
  const manifest = join(pkcs11js, 'package.json');
  const before = JSON.parse(readFileSync(manifest, 'utf8')) as Record<string, unknown>;
  const after = { ...before, gypfile: false, files: ['index.js', 'index.d.ts', compiled] };
  // A new file under the old name: the old one may be linked into other checkouts.
  writeFileSync(`${manifest}.new`, `${JSON.stringify(after, undefined, 2)}\n`);
  renameSync(`${manifest}.new`, manifest);
  // npm believes its own notes of what is installed, which lack `files`, as long as no package's folder is newer than they are.
  for (const source of ['binding.gyp', 'src', 'includes', 'build/Release/obj.target', 'build/Release/.deps'])
    rmSync(join(pkcs11js, source), { recursive: true, force: true });
}
